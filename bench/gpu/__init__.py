"""Measurements on a GPU machine without network, in stages; on a CPU, without meaning, a dry run of all of them."""
