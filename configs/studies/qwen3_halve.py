r"""The paper's protocol: half of Qwen3's cache, recovered and evaluated (arXiv 2601.19611).

    python -m studies.halve --config configs/studies/qwen3_halve.py --model Qwen/Qwen3-30B-A3B
    python -m studies.halve --config configs/studies/qwen3_halve.py --model FOLDER \
        --config.text=jsonl:corpus.jsonl --config.harness.limit=200 --list

The study imports the model and compresses it once for each row of `compressions`. It continues to
train each compressed model and, as a control ("+ CPT" in the paper), the original for equally long.
Then it evaluates all of them. The paper compresses by `svd`, with "half", "deep" and "full" as
here, and trains on about 22B tokens at a peak of 1.6e-5. The steps, batch and text below are for a
first test; set your own. The default is our compression. The row with all layers is also run with
the paper's compression.
"""

from ml_collections import config_dict


def get_config():
    ours = {"method": "aligned", "budget": "measured", "repair": "layerwise"}
    paper = {"method": "svd", "budget": "uniform", "repair": "none"}
    return config_dict.ConfigDict(
        {
            "name": "qwen3_halve",
            # The source of documents for evaluation, compression and continued training.
            "text": "python_stdlib",
            "context_length": 0,  # positions of a window; 0: 2048, or the model's most
            "dtype": "bfloat16",  # of the imported parameters
            "keep": 0.5,  # share of the cache that is kept in the compressed layers
            "compressions": {  # arguments of mea_jax.compress
                "half": {"layers": "half", **ours},
                "deep": {"layers": "deep", **ours},
                "full": {"layers": "full", **ours},
                "full_svd": {"layers": "full", **paper},
            },
            "compress": {"calibration_tokens": 131072, "held_out_tokens": 131072},  # for all rows
            "recover": {  # changes to configs/recover.py; steps of 0: no continued training
                "steps": 500,
                "batch_size": 8,
                "optimizer": {"learning_rate": 1.6e-5, "warmup_steps": 20},
            },
            "recipe": "configs/recover.py",
            "contexts": (4096, 32768),  # slots of the cache at which decoding is timed; (): none
            "tasks": (
                *("mmlu", "arc_challenge", "hellaswag"),  # knowledge
                *("gsm8k", "minerva_math500"),  # mathematics, where the paper loses most
            ),
            "harness": {"include_path": "", "limit": 0, "num_fewshot": -1},  # 0, -1: unchanged
        }
    )
