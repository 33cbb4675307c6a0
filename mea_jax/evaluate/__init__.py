"""Measure the quality and speed of models, and what compressing their caches costs.

`python -m mea_jax.evaluate` measures (run.py) and writes report.json, a table and figures for one
or several models:

- token_losses.py: nats per held-out token, by source of text and by position.
- tasks.py, scoring.py, retrieval.py, arithmetic.py: tasks with right and wrong answers, answered
  through the KV cache.
- harness/: tasks of lm-evaluation-harness, with --tasks.
- speed.py: speed of decoding and prefill by context length.
"""
