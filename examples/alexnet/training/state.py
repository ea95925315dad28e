"""What training goes on with from step to step, and what it is measured by."""

from typing import Any, NamedTuple

import jax


class Metrics(NamedTuple):
    """Mean loss and share of right answers of one batch."""

    loss: jax.Array
    accuracy: jax.Array


class TrainState(NamedTuple):
    """What a checkpoint holds: whole kernels, each device with its towers' part of them.

    Attributes:
      step: steps done.
      params: of the whole net, float32.
      opt_state: the optimizer's, its moments where the parameters lie.
      average: the running mean of the parameters, or () where there is none.
      plateau: of the division of the learning rate, see `optimizer.plateau`.
      loss_scale: of float16, or ().
      epoch: sums of the metrics of the epoch's steps.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any
    plateau: Any
    loss_scale: Any
    epoch: Metrics


class Evaluation(NamedTuple):
    """Means over the test images; `top5` of as many as there are classes, if they are fewer."""

    loss: float
    top1: float
    top5: float
