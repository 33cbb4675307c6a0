"""Linen modules, their parameters and shardings, the KV cache, and FLOPs."""
