"""What a model is worth, and what compressing its cache costs: one report for one or several.

`python -m mea_jax.evaluate` measures (profile.py) and writes report.json, a table and figures:

- token_losses.py: nats per held-out token, by source of text and by position.
- tasks.py, scoring.py, retrieval.py, arithmetic.py: tasks with right and wrong answers, answered
  through the KV cache.
- harness/: tasks of lm-evaluation-harness, with --tasks.
- speed.py: decoding and prefill against the length of the context.
"""
