"""Faults in real training processes: python -m tests.campaigns.faults."""
