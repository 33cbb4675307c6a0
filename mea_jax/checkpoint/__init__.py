"""What a run writes, and how it is verified and read."""
