"""Adapters to training stacks: a module imports its library; `import lioncub` imports none of them."""
