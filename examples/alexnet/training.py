"""The training state, the program that each device runs, and the steps made of it."""

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
from grouped_conv_jax.pmapping import Pmap
from grouped_conv_jax.towers import DATA, Placement, TowerNet


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
      optimizer: of the whole net's parameters, each number's update depending on no other one.
      image_size: pixels along an edge that the net sees, cropped out of the images given.
      normalization: of the training images.
      flip: whether to train on mirrored images too.
      seed: of the weights, crops and dropout.
      placement: how the net comes to its devices, see `TowerNet.by_example`; the losses do not
        depend on it.
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
        placement: Placement = "shard_map",
    ):
        self.net = net
        self._optimizer = optimizer
        self._image_size = image_size
        self._normalization = normalization
        self._flip = flip
        self._init_key, self._step_key = jax.random.split(
            # Of all of JAX's generators the one whose numbers do not depend on the devices.
            jax.random.key(seed, impl="threefry2x32")
        )
        right = net.by_example(self._right_by_example, placement)
        self._count_right: Any = lambda params, *batch: jnp.sum(right(params, *batch))
        # The batch's shape is constant, so a second trace would mean a second compilation. chex
        # counts the traces of all trainers together.
        chex.clear_trace_counter()
        once = chex.assert_max_traces(n=1)
        self._train_step: Any
        if placement == "pmap":
            by_example = PartitionSpec(DATA)
            self._train_step = Pmap(
                once(self._step_on_device),
                net.mesh,
                in_specs=(self._state(net.specs, PartitionSpec()), by_example, by_example),
                out_specs=(self._state(net.specs, PartitionSpec()), PartitionSpec()),
                donate_argnums=(0,),
            )
        else:
            self._train_step = jax.jit(once(self._step), donate_argnums=0)
            self._count_right = jax.jit(self._count_right)
            self._forward = net.by_example(self._scores, placement)

    def init(self) -> TrainState:
        """The state before the first step, the same on every mesh and in every placement."""
        return jax.jit(self._first_state, out_shardings=self._shardings)(self._init_key)

    def step(self, state: TrainState, batch: Split) -> tuple[TrainState, Metrics]:
        """One step on a batch; `state` is used up."""
        return self._train_step(state, *self._put(batch))

    def everywhere(self, array: jax.Array) -> jax.Array:
        """A whole array, such as a kernel, on every device."""
        replicated = NamedSharding(self.net.mesh, PartitionSpec())
        return jax.jit(lambda x: x, out_shardings=replicated)(array)

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(self._first_state, self._init_key),
            self._shardings,
        )

    def lower(self, batch_size: int, image_shape: tuple[int, ...]) -> jax.stages.Lowered:
        """The training step, neither compiled nor run, for batches of images of one shape."""
        batch = self._abstract_batch(batch_size, image_shape)
        return self._train_step.lower(self.abstract_state, *batch)

    def compile(self, batch_size: int, image_shape: tuple[int, ...]) -> None:
        """Compiles ahead of time what `step` and `accuracy` will run; not for pmap."""
        batch = self._abstract_batch(batch_size, image_shape)
        self._train_step.lower(self.abstract_state, *batch).compile()
        self._count_right.lower(self.abstract_state.params, *batch).compile()

    def _abstract_batch(
        self, batch_size: int, image_shape: tuple[int, ...]
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        self.net.check_batch(batch_size)
        examples = self.net.examples
        images = jax.ShapeDtypeStruct((batch_size, *image_shape), np.uint8, sharding=examples)
        return images, jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=examples)

    def accuracy(self, params: Any, split: Split, batch_size: int) -> float:
        """Share of right answers on a whole split, from the middle of each image."""
        right = 0
        for batch in padded_batches(split, batch_size):
            right += int(self._count_right(params, *self._put(batch)))
        return right / len(split)

    def _put(self, batch: Split) -> tuple[jax.Array, jax.Array]:
        """The batch on its devices; of several processes, each puts what its devices need."""
        self.net.check_batch(len(batch))

        def put(array: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(array.shape, self.net.examples, array.__getitem__)

        return put(batch.images), put(batch.labels)

    # The state. The optimizer's moments lie where the parameters do that they belong to.

    def _first_state(self, key: jax.Array) -> TrainState:
        params = self.net.init(key)
        opt_state = self._optimizer.init(params)
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)

    @property
    def _shardings(self) -> TrainState:
        everywhere = NamedSharding(self.net.mesh, PartitionSpec())
        return self._state(self.net.shardings, everywhere)

    def _state(self, by_param: Any, other: Any) -> TrainState:
        """A state of what belongs to each parameter, and of `other` where that is none."""
        state = jax.eval_shape(self._first_state, self._init_key)
        opt_state = optax.tree_map_params(
            self._optimizer,
            lambda _, belongs: belongs,
            state.opt_state,
            by_param,
            transform_non_params=lambda _: other,
        )
        return TrainState(step=other, params=by_param, opt_state=opt_state)

    # A step, as the computation of the whole net.

    def _step(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, Metrics]:
        keys = self._keys(state, len(labels))

        def mean_loss(params):
            losses, right = self._forward(params, images, labels, keys)
            return jnp.mean(losses), jnp.mean(right)

        (loss, accuracy), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        return self._updated(state, grads), Metrics(loss=loss, accuracy=accuracy)

    # The same step, as the program of one device under pmap.

    def _step_on_device(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, Metrics]:
        count = len(labels)
        batch = count * lax.axis_size(DATA)
        keys = self._keys(state, batch)
        keys = lax.dynamic_slice_in_dim(keys, lax.axis_index(DATA) * count, count)

        def share(params):
            """What this device has of the mean loss; those with the same examples have the same."""
            losses, right = self._scores(self.net.on_device(params), images, labels, keys)
            copies = self.net.mesh.size // self.net.mesh.shape[DATA]
            return jnp.sum(losses) / (batch * copies), (losses, right)

        grads, scores = jax.grad(share, has_aux=True)(state.params)
        loss, accuracy = (lax.psum(jnp.sum(x), DATA) / batch for x in scores)
        state = self._updated(state, self.net.sum_gradients(grads))
        return state, Metrics(loss=loss, accuracy=accuracy)

    def _keys(self, state: TrainState, batch: int) -> jax.Array:
        """A key for each example of the step's batch."""
        return jax.random.split(jax.random.fold_in(self._step_key, state.step), batch)

    def _updated(self, state: TrainState, grads: Any) -> TrainState:
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state)

    # Of each example, by the whole net or by that of a device's towers.

    def _scores(self, net, images, labels, keys):
        """The loss of each example, and whether the answer is right."""
        crop_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        images = jax.vmap(self._random_crop)(images, crop_keys)
        logits = net(self._normalize(images), dropout_keys=dropout_keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, jnp.argmax(logits, axis=-1) == labels

    def _right_by_example(self, net, images, labels):
        start = (images.shape[1] - self._image_size) // 2
        middle = slice(start, start + self._image_size)
        logits = net(self._normalize(images[:, middle, middle]))
        return jnp.argmax(logits, axis=-1) == labels

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
