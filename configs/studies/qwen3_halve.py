"""The paper's protocol: half of Qwen3's cache, recovered and evaluated (arXiv 2601.19611).

    python -m studies.halve --config configs/studies/qwen3_halve.py --model Qwen/Qwen3-30B-A3B
    python -m studies.halve --config configs/studies/qwen3_halve.py --model FOLDER \\
        --config.text=jsonl:corpus.jsonl --config.harness.limit=200 --list

Import, then for each row of `compressions` one compressed model, each trained on as long as the
original is (the control, "+ CPT" of the paper), and all of them evaluated. The paper compresses by
`svd`, "half", "deep" and "full" as here, and trains on about 22B tokens at a peak of 1.6e-5; steps,
batch and text below are a first look's, so give your own. Compression is ours by default, with the
paper's beside it where all layers are compressed.
"""

from ml_collections import config_dict


def get_config():
    ours = {"method": "aligned", "budget": "measured", "repair": "layerwise"}
    paper = {"method": "svd", "budget": "uniform", "repair": "none"}
    return config_dict.ConfigDict(
        {
            "name": "qwen3_halve",
            # What evaluate, compress and the continued training read: a source of documents.
            "text": "python_stdlib",
            "context_length": 0,  # positions of a window; 0: 2048, or as many as the model takes
            "dtype": "bfloat16",  # of the imported parameters
            "keep": 0.5,  # share of the cache, of the layers chosen
            "compressions": {  # arguments of mea_jax.compress
                "half": {"layers": "half", **ours},
                "deep": {"layers": "deep", **ours},
                "full": {"layers": "full", **ours},
                "full_svd": {"layers": "full", **paper},
            },
            "compress": {"calibration_tokens": 131072, "held_out_tokens": 131072},  # of them all
            "recover": {  # what configs/recover.py is changed in; steps of 0: none is trained on
                "steps": 500,
                "batch_size": 8,
                "optimizer": {"learning_rate": 1.6e-5, "warmup_steps": 20},
            },
            "recipe": "configs/recover.py",
            "contexts": (4096, 32768),  # slots of the cache at which decoding is timed; (): none
            "tasks": (
                *("mmlu", "arc_challenge", "hellaswag"),  # knowledge
                *("gsm8k", "minerva_math500"),  # mathematics, which the paper loses most of
            ),
            "harness": {"include_path": "", "limit": 0, "num_fewshot": -1},  # 0, -1: the task's own
        }
    )
