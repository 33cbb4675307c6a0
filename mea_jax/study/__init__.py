"""Studies: what is run, what is kept of it, and how it is drawn."""
