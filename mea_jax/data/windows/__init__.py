"""Writing the windows of a source: a TFDS builder, which must live in a package of its own."""
