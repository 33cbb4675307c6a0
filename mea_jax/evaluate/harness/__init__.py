"""Run lm-evaluation-harness in this process, with a checkpoint of this project as its model.

- prefix_trees.py, likelihood.py: pack requests as token trees and compute their log-probabilities.
- generating.py: generates answers through the KV cache.
- model.py: the harness's model class; placing.py: puts its parameters on a mesh.
- run.py, differences.py: `python -m mea_jax.evaluate --tasks`: tasks, tables, differences.

`python -m studies.harness_suite` writes this project's own tasks.

`python -m mea_jax.evaluate.harness` is the harness's own command line with this model registered.
"""
