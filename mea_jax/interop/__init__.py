"""Models in the formats of others: Hugging Face checkpoints in and out."""
