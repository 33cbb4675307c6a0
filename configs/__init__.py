"""Configs of runs, one per file: `python -m mea_jax.train --config configs/<file>.py[:variant]`."""
