"""Faults on real training processes: python -m tests.campaigns.faults."""
