"""Helpers of the tests of preparation."""

import numpy as np

from mea_jax.data import packing, sources
from mea_jax.data import prepare as prepare_lib
from mea_jax.data.corpus import unit_hash
from mea_jax.data.windows import reader

FRACTION = 0.3
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def prepare(config, vocab_size=None, **kwargs):
    return prepare_lib.prepare(config, vocab_size, log=lambda line: None, **kwargs)


def documents(config, held_out):
    return [
        document.text
        for source in config.sources
        for document in sources.documents(source)
        if (unit_hash(document.name) < config.held_out_fraction) == held_out
    ]


def stored(prepared, split):
    """Return the text of all targets of a split, in stored order."""
    targets = [
        packing.fields(**window)["targets"][window["segment_ids"] > 0]
        for source in prepared.sources
        for window in reader.open_windows(source.directory, split, prepared.context_length)
    ]
    return prepared.tokenizer.decode(np.concatenate(targets).tolist())


def entries(config):
    return list(prepare_lib.cache_root(config).iterdir())
