"""What ``lioncub plan`` does: predict the step time of a cluster from its links, or from a profile."""
