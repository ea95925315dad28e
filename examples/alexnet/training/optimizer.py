"""The paper's momentum, with what later recipes add to it; the learning rate over the steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from alexnet.config import Recipe

FACTOR = 0.1
"""What the learning rate is multiplied by at a drop."""

LEAST = 1e-4
"""By how much the error must fall to count as progress: one image in ten thousand."""


def learning_rate(recipe: Recipe, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """By the number of steps done before, as far as it is known at the start (see `plateau`)."""
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
    """SGD with the learning rate inside the momentum: v = m v - lr (g + d w), w = w + v.

    `optax.sgd` has it outside, which is another path once the rate falls: there the old momentum
    shrinks at once. Its `update` takes one more argument, `learning_rate`, of this step.
    """
    everything = recipe.decay_biases or _kernels
    return optax.chain(
        optax.add_decayed_weights(recipe.weight_decay, mask=everything),
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
    """Divides the learning rate when the error stalls; its state's `scale` says by how much.

    To be updated once for each evaluation, with the error as `value`.
    """
    return contrib.reduce_on_plateau(
        factor=FACTOR,
        patience=recipe.patience,
        rtol=0.0,
        atol=LEAST,
        min_scale=FACTOR**recipe.most_drops,
    )


def average(recipe: Recipe, params: Any, old: Any, step: jax.Array) -> Any:
    """The running mean of the parameters after `step` steps."""
    done = step.astype(jnp.float32)
    decay = jnp.minimum(recipe.ema, (1.0 + done) / (10.0 + done))
    return optax.incremental_update(params, old, 1.0 - decay)


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, **others: Any) -> Any:
        del params
        rate = others["learning_rate"]
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _biases(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim == 1, params)


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)
