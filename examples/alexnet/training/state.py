"""The training state and the numbers that it is measured by."""

from typing import Any, NamedTuple

import jax


class Metrics(NamedTuple):
    """Mean loss and share of right answers of one batch."""

    loss: jax.Array
    accuracy: jax.Array


class TrainState(NamedTuple):
    """The content of a checkpoint: whole kernels, of which each device has its towers' part."""

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any  # The running mean of the parameters, or ().
    plateau: Any  # The state of `optimizer.plateau`.
    loss_scale: Any  # The `DynamicScale` of float16, or ().
    epoch: Metrics  # Sums over the epoch's steps.


class Evaluation(NamedTuple):
    """Means over the test images. With fewer than five classes, `top5` counts all of them."""

    loss: float
    top1: float
    top5: float
