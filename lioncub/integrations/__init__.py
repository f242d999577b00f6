"""Training stacks that wrap the model in DDP and save one rank's optimizer state: one module for each.

A module imports its library; `import lioncub` imports none of them.
"""
