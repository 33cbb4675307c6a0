"""lm-evaluation-harness, with a checkpoint of this project as its model, in this process.

- prefix_trees.py, likelihood.py: requests as trees of tokens in rows, and their log-probabilities.
- generating.py: answers through the KV cache.
- model.py: the harness's model; placing.py: its parameters on a mesh.
- command.py, results.py: `python -m mea_jax.evaluate --tasks`: tasks, tables, differences.
- suite.py, functions.py: `python -m mea_jax.evaluate.harness.suite` writes tasks of our own.

`python -m mea_jax.evaluate.harness` is the harness's own command line, which knows this model.
"""
