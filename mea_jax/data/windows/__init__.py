"""Writing and reading of a source's windows; TFDS requires a separate package for the builder."""
