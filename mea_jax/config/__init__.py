"""The options of a run: schema, parsing, checks, presets, and paths."""
