"""Plan a step for devices that need not exist here: memory, FLOPs, bytes, collectives.

    python -m mea_jax.plan --config configs/mea_1b.py --topology v5p:4x4x4

The real step is compiled ahead of time (programs.py, compiling.py) for a described machine
(target.py, chips.py). The text of the compiled program is parsed (hlo.py), and its costs are
counted with loops multiplied out (costs.py, collectives.py). A roofline turns the counts into times
(roofline.py), and output.py prints them. Everything here is an estimate: nothing runs.
"""
