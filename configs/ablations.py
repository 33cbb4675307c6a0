"""Ablations of MEA, each near its best learning rate, to measure the effect of each part.

    python -m mea_jax.study run --config configs/ablations.py --workers 2
    python -m mea_jax.study run --config configs/ablations.py:parts --list

The argument is a group of variants; without an argument all groups run. "parts": head norm x
mixing, mixing of keys or values only, and kinds, initialisation and weight decay of the mixing.
"order": mixing before or after a key norm and the rotation (the same function without that norm).
"positions": position encodings. "baselines": baselines. Model, data and schedule are those of the
smaller size of `configs/lr_study.py`, so that rows of both can be compared.
"""

import importlib.util
from pathlib import Path

from mea_jax.errors import UserError, nearest

_spec = importlib.util.spec_from_file_location("lr_study", Path(__file__).parent / "lr_study.py")
assert _spec is not None
assert _spec.loader is not None
lr_study = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lr_study)

MHA = lr_study.VARIANTS["mha"]
MEA = lr_study.VARIANTS["mea"]
GROUPS = {
    "parts": {
        **{name: {"model": changes} for name, changes in lr_study.VARIANTS.items()},
        "mea_keys_only": {"model": MEA | {"hlc": "k"}},
        "mea_values_only": {"model": MEA | {"hlc": "v"}},
        "mea_frequency": {"model": MEA | {"key_mixing": "frequency"}},
        "mea_dense": {"model": MEA | {"value_mixing": "dense"}},
        "mea_normal_init": {"model": MEA | {"hlc_init": "normal"}},
        "mea_decay": {"model": MEA, "optimizer": {"decay_mixing": True}},
        "mea_half": {"model": MEA | {"key_components": 2, "value_components": 2}},
        "gqa_half": {"model": MHA | {"n_kv_heads": 2}},
    },
    "order": {
        "mha_qk_norm": {"model": MHA | {"qk_norm": True}},
        "mea_qk_norm": {"model": MEA | {"qk_norm": True}},
        "mea_qk_norm_after": {"model": MEA | {"qk_norm": True, "hlc_order": "after"}},
    },
    "positions": {
        "mha": {"model": MHA},
        "mea": {"model": MEA},
        **{
            f"{name}_{positions}": {"model": model | {"positions": positions} | more}
            for positions, more in (
                ("alibi", {}),
                ("learned", {"max_positions": 128}),
                ("none", {}),
            )
            for name, model in (("mha", MHA), ("mea", MEA))
        },
    },
    "baselines": {
        "differential_v1": {"model": MHA | {"variant": "differential_v1"}},
        "differential_v2": {"model": MHA | {"variant": "differential_v2"}},
        "talking_heads": {"model": MHA | {"variant": "talking_heads"}},
        "gated": {"model": MHA | {"gate": "feature"}},
    },
}


def get_config(argument: str = ""):
    if argument and argument not in GROUPS:
        raise UserError(f"the ablations have no group {argument!r}: {nearest(argument, GROUPS)}")
    config = lr_study.get_config()
    config.name = f"ablations_{argument}" if argument else "ablations"
    groups = [argument] if argument else list(GROUPS)
    config.variants = {name: changes for group in groups for name, changes in GROUPS[group].items()}
    config.sizes = {"d128": {"model": lr_study.SIZES["d128"]}}
    config.per_size = {}
    config.learning_rates = (2e-3, 4e-3, 8e-3)
    config.seeds = (0, 1)
    return config
