"""Benchmarks: `python -m benchmarks.<name>`; each prints a table and writes JSON and a picture."""
