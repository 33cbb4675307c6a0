"""Plans of a step for devices that need not exist here: memory, FLOPs, bytes, collectives.

    python -m mea_jax.plan --config configs/mea_1b.py --topology v5p:4x4x4

The real step is compiled ahead of time (programs.py, compiling.py) for a described machine
(target.py, chips.py); the compiled program is read as text (hlo.py) and counted, loops multiplied
out (costs.py, collectives.py); a roofline turns counts into times (roofline.py), and output.py
prints them.
Everything here is an estimate: nothing runs.
"""
