"""The training command behind ``lioncub train``: a small byte-level GPT, trained by several local workers."""
