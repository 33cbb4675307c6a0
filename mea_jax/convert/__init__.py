"""The commands that bring published models in and take models out."""
