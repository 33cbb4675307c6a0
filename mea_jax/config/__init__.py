"""The options of a run: their schema, how they are read and checked, presets, and paths."""
