"""Compression: rebuild a trained model's keys and values from fewer heads, layer by layer."""
