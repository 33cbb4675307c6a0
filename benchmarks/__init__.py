"""Benchmarks: `python -m benchmarks.<name>` prints a table and can write JSON and a figure."""
