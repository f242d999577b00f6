"""Shared by all benchmarks: records as JSON lines, the machine's facts, tables in Markdown and one style of plots."""
