"""The network lab: hosts as network namespaces on links of a known speed, and the comparison that runs in it."""
