"""Text from a KV cache."""
