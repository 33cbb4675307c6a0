"""Make AdamW and its schedule, and select the parameters that are trained and decayed."""

from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from mea_jax.config.schema import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step: linear warmup, then `config.schedule`.

    Step i of the warmup has (i + 1) / (warmup + 1) of the peak. After the warmup follows one of

    - "cosine": half a cosine to `final_fraction` of the peak at the last step;
    - "constant": the peak;
    - "wsd": the peak, then a linear decay to `final_fraction` of it over the last `decay_fraction`
      of all steps (warmup-stable-decay).
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
    # Not from 0, so that the first update changes the parameters.
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after], [warmup])


def trainable(params: Any, which: str) -> Any:
    """Return the subtree of `params` that a run updates; `which` is `StartConfig.trainable`.

    The result is a tree without the frozen parameters, not a mask. So frozen parameters have no
    gradients, moments or weight decay, and no norm includes them. "attention" leaves out what is
    fitted to text and not trained: the mean of keys and the steps of slots.
    """
    if which == "all":
        return params
    flat = flatten_dict(params)
    kept = {k: v for k, v in flat.items() if "attention" in k and not is_fitted(k[-1])}
    return unflatten_dict(kept)


def is_fitted(name: str) -> bool:
    """Return whether a parameter is a constant of the cache: a mean of keys, or steps of slots."""
    return name.endswith(("_mean", "_steps"))


def merge_params(params: Any, part: Any) -> Any:
    """Return `params` with the leaves of `part`, a tree made by `trainable`, in their places."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(part))


def decay_mask(params, decay_mixing: bool):
    """Return a tree of bools that says which parameters have weight decay.

    It applies to matrices, not to norm scales, biases and other vectors. It applies to W_lc only if
    `decay_mixing`, since decay would pull W_lc from the identity towards zero.

    The selection is by name, not by rank, since scanned layers give every parameter one more axis.
    """

    def leaf(path, _):
        name = path[-1].key
        if (
            name == "scale"
            or name.endswith("_bias")
            or is_fitted(name)
            or name.startswith("lambda_")
        ):
            return False
        return decay_mixing or not name.endswith("_mixing")

    return jax.tree_util.tree_map_with_path(leaf, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return AdamW with the schedule and the decay mask, after clipping by the global norm.

    `clip_norm=0` turns clipping off.
    """
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: decay_mask(params, config.decay_mixing),
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def advance_schedule(opt_state: optax.OptState) -> optax.OptState:
    """Return the state with its schedule advanced by one step and everything else unchanged.

    The schedule counts every step of the run, including those whose update is left out. Adam's own
    count belongs to its moments and stays unchanged.
    """

    def is_schedule(node) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def leaf(node):
        return node._replace(count=node.count + 1) if is_schedule(node) else node

    return jax.tree.map(leaf, opt_state, is_leaf=is_schedule)
