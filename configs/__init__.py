"""Runs, one a file: `python -m mea_jax.train --config configs/<file>.py[:variant]`."""
