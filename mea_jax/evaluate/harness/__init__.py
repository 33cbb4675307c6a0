"""lm-evaluation-harness, with a checkpoint of this project as its model, in this process.

- prefix_trees.py, likelihood.py: requests as trees of tokens in rows, and their log-probabilities.
- generating.py: answers through the KV cache.
- model.py: the harness's model; placing.py: its parameters on a mesh.
- run.py, differences.py: `python -m mea_jax.evaluate --tasks`: tasks, tables, differences.

`python -m studies.harness_suite` writes tasks of our own.

`python -m mea_jax.evaluate.harness` is the harness's own command line, which knows this model.
"""
