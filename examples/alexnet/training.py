"""The training state, the program that each device runs, and the steps made of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from alexnet.data import Split, padded_batches
from grouped_conv_jax.models import AlexNet, AlexNetConfig
from grouped_conv_jax.towers import DATA, TowerNet


class TrainState(NamedTuple):
    """What a checkpoint holds: whole kernels, each device with its towers' part of them."""

    step: jax.Array
    params: Any
    opt_state: Any


class Metrics(NamedTuple):
    """Mean loss and share of right answers of one batch."""

    loss: jax.Array
    accuracy: jax.Array


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel of the training images, 0 to 255."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray) -> "Normalization":
        """Of images (N, H, W, channels)."""
        axes = (0, 1, 2)
        std = images.std(axes, dtype=np.float64).astype(np.float32)
        return cls(images.mean(axes, dtype=np.float64).astype(np.float32), np.maximum(std, 1.0))


class Trainer:
    """Trains one net on one mesh.

    Args:
      net: the towers on their devices.
      optimizer: applied to the whole net's parameters.
      image_size: pixels along an edge that the net sees, cropped out of the images given.
      normalization: of the training images.
      flip: whether to train on mirrored images too.
      seed: of the weights, crops and dropout.
    """

    def __init__(
        self,
        net: TowerNet,
        optimizer: optax.GradientTransformation,
        *,
        image_size: int,
        normalization: Normalization,
        flip: bool,
        seed: int,
    ):
        self.net = net
        self._optimizer = optimizer
        self._image_size = image_size
        self._normalization = normalization
        self._flip = flip
        self._init_key, self._step_key = jax.random.split(jax.random.key(seed))
        self._by_example = NamedSharding(net.mesh, PartitionSpec(DATA))

        def program(function: Callable, outputs: Any) -> Callable:
            by_example = PartitionSpec(DATA)
            return jax.shard_map(
                function,
                mesh=net.mesh,
                in_specs=(net.specs, by_example, by_example, by_example),
                out_specs=outputs,
            )

        scalar = PartitionSpec()
        self._loss = program(self._loss_on_device, (scalar, scalar))
        self._right = jax.jit(program(self._right_on_device, scalar))
        # The batch's shape is constant, so a second trace would mean a second compilation. chex
        # counts the traces of all trainers together.
        chex.clear_trace_counter()
        self._train_step = jax.jit(chex.assert_max_traces(self._step, n=1), donate_argnames="state")

    def init(self) -> TrainState:
        """The state before the first step, the same on every mesh."""
        params = self.net.init(self._init_key)
        everywhere = NamedSharding(self.net.mesh, PartitionSpec())
        # The optimizer's moments get the shardings of the parameters that they belong to.
        opt_state = jax.jit(
            self._optimizer.init,
            out_shardings=optax.tree_map_params(
                self._optimizer,
                lambda _, sharding: sharding,
                jax.eval_shape(self._optimizer.init, params),
                self.net.shardings,
                transform_non_params=lambda _: everywhere,
            ),
        )(params)
        step = jax.device_put(jnp.zeros((), jnp.int32), everywhere)
        return TrainState(step=step, params=params, opt_state=opt_state)

    def step(self, state: TrainState, batch: Split) -> tuple[TrainState, Metrics]:
        """One step on a batch; `state` is used up."""
        images, labels = jax.device_put((batch.images, batch.labels), self._by_example)
        return self._train_step(state=state, images=images, labels=labels)

    def accuracy(self, params: Any, split: Split, batch_size: int) -> float:
        """Share of right answers on a whole split, from the middle of each image."""
        right = 0
        for batch in padded_batches(split, batch_size):
            images, labels = jax.device_put((batch.images, batch.labels), self._by_example)
            right += int(self._right(params, images, labels, labels))
        return right / len(split)

    def _step(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, Metrics]:
        keys = jax.random.split(jax.random.fold_in(self._step_key, state.step), len(labels))
        (loss, accuracy), grads = jax.value_and_grad(self._loss, has_aux=True)(
            state.params, images, labels, keys
        )
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
        return new, Metrics(loss=loss, accuracy=accuracy)

    # What each device runs: its towers' parameters, its examples.

    def _loss_on_device(self, params, images, labels, keys):
        crop_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        images = jax.vmap(self._random_crop)(images, crop_keys)
        logits = self.net.on_device(params)(self._normalize(images), dropout_keys=dropout_keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        right = jnp.argmax(logits, axis=-1) == labels
        return lax.pmean(jnp.mean(losses), DATA), lax.pmean(jnp.mean(right), DATA)

    def _right_on_device(self, params, images, labels, _):
        start = (images.shape[1] - self._image_size) // 2
        middle = slice(start, start + self._image_size)
        logits = self.net.on_device(params)(self._normalize(images[:, middle, middle]))
        return lax.psum(jnp.sum(jnp.argmax(logits, axis=-1) == labels), DATA)

    def _normalize(self, images):
        mean, std = (jnp.broadcast_to(x, images.shape) for x in self._normalization)
        return (images.astype(jnp.float32) - mean) / std

    def _random_crop(self, image, key):
        offset_key, flip_key = jax.random.split(key)
        offsets = jax.random.randint(offset_key, (2,), 0, image.shape[0] - self._image_size + 1)
        size = (self._image_size, self._image_size, image.shape[2])
        crop = lax.dynamic_slice(image, (offsets[0], offsets[1], jnp.zeros_like(offsets[0])), size)
        if not self._flip:
            return crop
        return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)


def paper_optimizer(
    learning_rate: optax.ScalarOrSchedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """SGD as in the paper: the learning rate is inside the momentum, v = m v - lr (g + d w)."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(momentum),
    )


def tower_net(config: AlexNetConfig, mesh: jax.sharding.Mesh, implementation: str | None):
    """AlexNet with its towers spread over the mesh."""
    return TowerNet(
        lambda axis_size, rngs: AlexNet(
            config, axis_size=axis_size, implementation=implementation, rngs=rngs
        ),
        mesh,
    )
