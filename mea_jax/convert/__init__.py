"""Convert published models to run directories, and checkpoints to models for other programs."""
