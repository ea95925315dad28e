"""A resumed run that becomes longer or shorter: what is refused, and what the user is told."""

import math

import jax.numpy as jnp

from alexnet.config import TrainConfig
from alexnet.errors import UsageError
from alexnet.training import optimizer


def extension(
    saved: TrainConfig, config: TrainConfig, *, done: int, steps_per_epoch: int, scale: float
) -> str:
    """Says how a new length changes a run and its learning rate; nothing if the length is the same.

    The schedule is computed from the new length alone. So a run that is killed after its extension
    goes on as any other run, from the settings in its folder.

    Args:
      saved: the settings of the run.
      config: the same settings, but for the new `epochs` or `steps`.
      done: steps that the run has done.
      steps_per_epoch: whole batches in the training images.
      scale: the plateau's factor of the learning rate.

    Raises:
      UsageError: the run has already done more steps than its new length.
    """
    before, now = (c.total_steps(steps_per_epoch) for c in (saved, config))
    if before == now:
        return ""
    if now < done:
        name, value, least = (
            ("epochs", config.epochs, math.ceil(done / steps_per_epoch))
            if config.steps is None
            else ("steps", config.steps, done)
        )
        raise UsageError(
            f"the run has already done {done} steps ({done / steps_per_epoch:.4g} epochs), so "
            f"--{name} must be at least {least}, got {value}"
        )
    text = (
        f"The run now ends after {now} steps ({now / steps_per_epoch:.4g} epochs) instead of "
        f"{before} ({before / steps_per_epoch:.4g})"
    )
    if now == done:
        return f"{text}, which are done."
    recipe = config.recipe
    old_rate, rate = (
        scale * float(jnp.asarray(optimizer.learning_rate(recipe, steps, steps_per_epoch)(done)))
        for steps in (before, now)
    )
    change = "as before" if rate == old_rate else f"instead of {old_rate:.4g}"
    end = "; the cosine falls to 0 at the new end" if recipe.schedule == "cosine" else ""
    return f"{text}. The next learning rate is {rate:.4g}, {change}{end}."
