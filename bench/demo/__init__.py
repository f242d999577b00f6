"""Plain Lion under DDP and LionCub, side by side, on a small byte-level GPT."""
