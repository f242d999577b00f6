"""What ``lioncub probe`` does: measure a group, store its profile, show it."""
