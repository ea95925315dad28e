"""The paper's momentum, with later additions, and the learning rate over the steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from alexnet.config import Recipe

FACTOR = 0.1
"""Factor of the learning rate at a drop."""

LEAST = 1e-4
"""Least fall of the error that counts as progress: one image in ten thousand."""


def learning_rate(recipe: Recipe, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the rate by the number of steps done, as far as it is known at the start.

    The factor of `plateau` comes on top of it.
    """
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), steps // 2)
    peak = recipe.learning_rate
    if recipe.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, 1))
    after = optax.constant_schedule(peak)
    if recipe.schedule == "steps":
        drops = {round(epoch * steps_per_epoch) - warmup: FACTOR for epoch in recipe.drop_epochs}
        after = optax.piecewise_constant_schedule(peak, drops)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(recipe: Recipe) -> optax.GradientTransformationExtraArgs:
    """Returns SGD with the learning rate inside the momentum: v = m v - lr (g + d w), w = w + v.

    `optax.sgd` has it outside. There the old momentum shrinks at once when the rate falls, which
    is another path. `update` takes one more argument, the `learning_rate` of the step.
    """
    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay, mask=recipe.decay_biases or _kernels),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=recipe.lars), _kernels)
        if recipe.lars
        else optax.identity(),
        optax.identity()
        if recipe.bias_rate == 1
        else optax.masked(optax.scale(recipe.bias_rate), _biases),
        _scale_by_learning_rate(),
        optax.trace(recipe.momentum),
    )


def plateau(recipe: Recipe) -> optax.GradientTransformationExtraArgs:
    """Returns the division of the learning rate when the error stalls, by its state's `scale`.

    It is updated once for each evaluation, with the error as `value`.
    """
    return contrib.reduce_on_plateau(
        factor=FACTOR,
        patience=recipe.patience,
        rtol=0.0,
        atol=LEAST,
        min_scale=FACTOR**recipe.most_drops,
    )


def average(recipe: Recipe, params: Any, old: Any, step: jax.Array) -> Any:
    """Returns the running mean of the parameters after `step` steps."""
    done = step.astype(jnp.float32)
    decay = jnp.minimum(recipe.ema, (1.0 + done) / (10.0 + done))
    return optax.incremental_update(params, old, 1.0 - decay)


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, **others: Any) -> Any:
        del params
        return jax.tree.map(lambda u: -others["learning_rate"] * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _biases(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim == 1, params)


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)
