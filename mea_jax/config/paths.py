"""The path of the cache of prepared data."""

import os
from pathlib import Path

from mea_jax.config.schema import DataConfig
from mea_jax.errors import UserError


def cache_root(config: DataConfig) -> Path:
    """Return the folder for prepared data and compiled programs; raise `UserError` for a URL."""
    root = config.cache_dir or os.environ.get("MEA_JAX_CACHE") or "~/.cache/mea_jax"
    if "://" in root:
        raise UserError(
            f"cache folder {root} is a URL: choose a local folder, or mount the bucket as one"
        )
    return Path(root).expanduser().resolve()
