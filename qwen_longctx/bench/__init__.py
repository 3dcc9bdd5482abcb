"""Benchmarks: each file measures one thing, and its `measure` yields plain rows for a results file."""
