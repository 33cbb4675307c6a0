"""Where the cache of prepared data is."""

import os
from pathlib import Path

from mea_jax.config.schema import DataConfig
from mea_jax.errors import UserError


def cache_root(config: DataConfig) -> Path:
    """The folder that prepared data, and compiled programs, are kept in."""
    root = config.cache_dir or os.environ.get("MEA_JAX_CACHE") or "~/.cache/mea_jax"
    if "://" in root:
        raise UserError(f"cache folder {root}: give a local folder; mount the bucket as a path")
    return Path(root).expanduser().resolve()
