"""What all benchmarks share: records as JSON lines, the machine's facts, tables in Markdown and one style of plots."""
