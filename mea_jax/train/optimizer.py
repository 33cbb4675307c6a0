"""AdamW, its schedule, which parameters it moves and which it decays."""

from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from mea_jax.config.schema import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup from 0 to the peak, then one of

    - "cosine": half a cosine to `final_fraction` of the peak at the last step;
    - "constant": the peak;
    - "wsd": the peak, then over the last `decay_fraction` of all steps linearly down to
      `final_fraction` of it (warmup-stable-decay).
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(steps - warmup, 1)
    final = config.final_fraction * peak
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay = max(min(round(config.decay_fraction * steps), rest), 1)
        falling = optax.linear_schedule(peak, final, decay)
        after = optax.join_schedules([optax.constant_schedule(peak), falling], [rest - decay])
    if warmup == 0:
        return after
    # The first update already moves: step i of the warmup has (i + 1) / (warmup + 1) of the peak.
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup])


def trainable(params: Any, which: str) -> Any:
    """The part of a tree of parameters that a run updates, as `StartConfig.trainable` says.

    A tree of its own without the rest, not a mask: what is frozen then has no gradient, no moments
    and no decay, and no norm is taken over it.
    """
    if which == "all":
        return params
    return unflatten_dict({k: v for k, v in flatten_dict(params).items() if "attention" in k})


def merged(params: Any, part: Any) -> Any:
    """`params` with the leaves of `part`, a tree as `trainable` makes it, in their places."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(part))


def decayed(params, decay_mixing: bool):
    """A tree of bools: weight decay applies to matrices, not to norm scales and other vectors, nor
    (unless `decay_mixing`) to W_lc, which decay would pull away from the identity towards zero.

    By name and not by rank, since scanned layers give every parameter one more axis.
    """

    def leaf(path, _):
        name = path[-1].key
        if name == "scale" or name.startswith("lambda_"):
            return False
        return decay_mixing or not name.endswith("_mixing")

    return jax.tree_util.tree_map_with_path(leaf, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with the schedule and the decay mask, after clipping by the global norm."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: decayed(params, config.decay_mixing),
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def advance_schedule(opt_state: optax.OptState) -> optax.OptState:
    """The state with its schedule one step further and all else as it is.

    The schedule goes by the steps of the run, those whose update is left out included. Adam's own
    count is that of its moments, and stays.
    """

    def is_schedule(node) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def leaf(node):
        return node._replace(count=node.count + 1) if is_schedule(node) else node

    return jax.tree.map(leaf, opt_state, is_leaf=is_schedule)
