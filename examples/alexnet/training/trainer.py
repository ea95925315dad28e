"""The training state, the program that each device runs, and the steps made of it."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from optax import microbatching

from alexnet.config import Recipe
from alexnet.data.augmentation import Preprocessing
from alexnet.data.pipeline import Batch
from alexnet.errors import UsageError
from alexnet.training import optimizer
from alexnet.training.state import Evaluation, Metrics, TrainState
from grouped_conv_jax.models import AlexNet, AlexNetConfig
from grouped_conv_jax.towers import DATA, Placement, Pmap, TowerNet

SMALLEST = microbatching.Accumulator(
    init=lambda tree: jax.tree.map(jnp.zeros_like, tree),
    update=lambda old, new, i: jax.tree.map(
        lambda a, b: jnp.where(i == 0, b, jnp.minimum(a, b)), old, new
    ),
    finalize=lambda tree: tree,
    aggregate=lambda tree: jax.tree.map(lambda x: x.min(axis=0), tree),
)
"""Keeps the smallest loss scale of the parts of a batch, and whether all gradients are finite."""


class Trainer:
    """Trains one net on one mesh. The losses do not depend on the mesh and on the placement.

    `image_size` is the edge that the net sees, cropped out of the images given. `steps` is the
    length of the run, and `flip` says whether to train on mirrored images too.
    """

    def __init__(
        self,
        net: TowerNet,
        recipe: Recipe,
        preprocessing: Preprocessing,
        *,
        image_size: int,
        steps: int,
        steps_per_epoch: int,
        flip: bool,
        seed: int,
        placement: Placement = "shard_map",
    ):
        self.net = net
        self._recipe = recipe
        self.preprocessing = preprocessing
        self._image_size = image_size
        self._steps_per_epoch = steps_per_epoch
        self._flip = flip
        self._optimizer = optimizer.optimizer(recipe)
        self._plateau = optimizer.plateau(recipe)
        self._schedule = optimizer.learning_rate(recipe, steps, steps_per_epoch)
        self._init_key, self._step_key = jax.random.split(
            # Only the numbers of this generator do not depend on the devices.
            jax.random.key(seed, impl="threefry2x32")
        )
        replicated = NamedSharding(net.mesh, PartitionSpec())
        self.everywhere = jax.jit(lambda x: x, out_shardings=replicated)
        self._finite = jax.jit(lambda tree: jnp.all(jnp.stack(
            [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])))  # fmt: skip
        self._divided = jax.jit(
            lambda state, error: self._plateau.update({}, state, value=error)[1]
        )
        tested = net.by_example(self._tested_by_example, placement)
        self._test: Any = lambda params, *batch: jax.tree.map(jnp.sum, tested(params, *batch))
        self._train_step: Any
        if placement == "pmap":
            by_example = PartitionSpec(DATA)
            state = self._state(net.specs, PartitionSpec())
            self._train_step = Pmap(
                self._step_on_device,
                net.mesh,
                in_specs=(state, by_example, by_example),
                out_specs=(state, PartitionSpec()),
                donate_argnums=(0,),
            )
        else:
            self._train_step = jax.jit(self._step, donate_argnums=0)
            self._test = jax.jit(self._test)
            self._forward = net.by_example(self._scores, placement)

    def init(self, params: Any = None) -> TrainState:
        """Returns the state before the first step, with random parameters or those given."""
        if params is not None:
            params = jax.device_put(params, self.net.shardings)
        first = jax.jit(self._first_state, out_shardings=self._shardings)
        return first(self._init_key, params)

    def step(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """Takes one step on a batch of `put`. The buffers of `state` are reused."""
        return self._train_step(state, images, labels)

    def evaluate(self, state: TrainState, batches: Iterable[Batch], batch_size: int) -> Evaluation:
        """Tests the parameters, or their running mean, on every image of the batches."""
        params = state.average or state.params
        sums = np.zeros(4)
        for batch in batches:
            images, labels = self.put(batch, batch_size)
            sums += [float(x) for x in jax.device_get(self._test(params, images, labels))]
        *totals, count = sums.tolist()
        if not count:
            raise UsageError("none of the test images can be decoded")
        return Evaluation(*(total / count for total in totals))

    def after_test(self, state: TrainState, error: float) -> TrainState:
        """Returns the state after an evaluation, whose learning rate may be divided."""
        if self._recipe.schedule != "plateau":
            return state
        return state._replace(plateau=self._divided(state.plateau, jnp.float32(error)))

    def rate(self, step: int, scale: float) -> float:
        """Returns the learning rate after `step` steps, with the plateau's scale."""
        return float(jnp.asarray(self._schedule(step))) * scale

    def finite(self, state: TrainState) -> bool:
        """Returns whether every parameter is finite."""
        return bool(self._finite(state.params))

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(self._first_state, self._init_key, None),
            self._shardings,
        )

    def lower(
        self, batch_size: int, image_shape: tuple[int, ...], *, test: bool = False
    ) -> jax.stages.Lowered:
        """Returns the training step, or the test, for images of one shape, not compiled."""
        self.net.check_batch(batch_size)
        examples, state = self.net.examples, self.abstract_state
        images = jax.ShapeDtypeStruct((batch_size, *image_shape), np.uint8, sharding=examples)
        labels = jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=examples)
        if test:
            return self._test.lower(state.params, images, labels)
        return self._train_step.lower(state, images, labels)

    def rows(self, batch_size: int) -> Sequence[int]:
        """Returns the rows of a batch that the devices of this process need."""
        self.net.check_batch(batch_size)
        needed = self.net.examples.addressable_devices_indices_map((batch_size,)).values()
        return sorted({row for part in needed if part for row in range(batch_size)[part[0]]})

    def put(self, batch: Batch, batch_size: int) -> tuple[jax.Array, jax.Array]:
        """Puts images and labels on their devices: this process's `rows` of the batch."""

        def put(array: np.ndarray) -> jax.Array:
            shape = (batch_size, *array.shape[1:])
            return jax.make_array_from_process_local_data(self.net.examples, array, shape)

        return put(batch.images), put(batch.labels)

    def _first_state(self, key: jax.Array, params: Any) -> TrainState:
        params = self.net.init(key) if params is None else params
        # Its numbers are arrays, like the rest of the state, and not Python's.
        scale = DynamicScale().replace(fin_steps=jnp.int32(0), scale=jnp.float32(2.0**15))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self._optimizer.init(params),
            average=params if self._recipe.ema else (),
            plateau=self._plateau.init({}),
            loss_scale=scale if self._recipe.dtype == "float16" else (),
            epoch=Metrics(jnp.zeros(()), jnp.zeros(())),
        )

    @property
    def _shardings(self) -> TrainState:
        return self._state(self.net.shardings, NamedSharding(self.net.mesh, PartitionSpec()))

    def _state(self, by_param: Any, other: Any) -> TrainState:
        """Returns a state with `by_param` for each parameter and its moments, else `other`."""
        state = jax.eval_shape(self._first_state, self._init_key, None)
        opt_state = optax.tree_map_params(
            self._optimizer,
            lambda _, belongs: belongs,
            state.opt_state,
            by_param,
            transform_non_params=lambda _: other,
        )
        return jax.tree.map(lambda _: other, state)._replace(
            params=by_param, opt_state=opt_state, average=by_param if state.average else ()
        )

    def _step(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """The step as the computation of the whole net."""

        def mean_loss(params, images, labels, keys):
            losses, right = self._forward(params, images, labels, keys)
            return jnp.mean(losses), jnp.mean(right)

        def gradients(images, labels, keys):
            batch = state.params, images, labels, keys
            if state.loss_scale:
                scaled = state.loss_scale.value_and_grad(mean_loss, has_aux=True)
                loss_scale, finite, scores, grads = scaled(*batch)
                return (loss_scale, finite), Metrics(*scores), grads
            scores, grads = jax.value_and_grad(mean_loss, has_aux=True)(*batch)
            return ((), jnp.bool_(True)), Metrics(*scores), grads

        if (parts := self._recipe.accumulate) > 1:
            mean = microbatching.AccumulationType.MEAN
            gradients = microbatching.microbatch(
                gradients, (0, 1, 2), len(labels) // parts, (SMALLEST, mean, mean)
            )
        keys = self._keys(state, len(labels))
        (loss_scale, finite), metrics, grads = gradients(images, labels, keys)
        new = self._updated(state, grads, metrics)
        if loss_scale:
            # A step whose gradients were too large for float16 changes nothing but the scale.
            kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
            new = kept._replace(step=new.step, epoch=new.epoch, loss_scale=loss_scale)
        return new, metrics

    def _step_on_device(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """The same step as the program of one device under pmap."""
        count = len(labels)
        batch = count * lax.axis_size(DATA)
        keys = self._keys(state, batch)
        keys = lax.dynamic_slice_in_dim(keys, lax.axis_index(DATA) * count, count)

        def share(params):
            """This device's part of the mean loss; those with the same examples have the same."""
            losses, right = self._scores(self.net.on_device(params), images, labels, keys)
            copies = self.net.mesh.size // self.net.mesh.shape[DATA]
            return jnp.sum(losses) / (batch * copies), (losses, right)

        grads, scores = jax.grad(share, has_aux=True)(state.params)
        metrics = Metrics(*(lax.psum(jnp.sum(x), DATA) / batch for x in scores))
        return self._updated(state, self.net.sum_gradients(grads), metrics), metrics

    def _keys(self, state: TrainState, batch: int) -> jax.Array:
        """Returns a key for each example of the step's batch."""
        return jax.random.split(jax.random.fold_in(self._step_key, state.step), batch)

    def _updated(self, state: TrainState, grads: Any, metrics: Metrics) -> TrainState:
        # Steps that float16 has skipped count, too.
        rate = jnp.asarray(self._schedule(state.step)) * state.plateau.scale
        updates, opt_state = self._optimizer.update(
            grads, state.opt_state, state.params, learning_rate=rate
        )
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if self._recipe.ema:
            average = optimizer.average(self._recipe, params, average, state.step)
        begins = state.step % self._steps_per_epoch == 0
        epoch = jax.tree.map(
            lambda total, now: jnp.where(begins, 0.0, total) + now, state.epoch, metrics
        )
        return state._replace(
            step=state.step + 1, params=params, opt_state=opt_state, average=average, epoch=epoch
        )

    def _scores(self, net, images, labels, keys):
        """Returns the loss of each example, and whether the answer is right."""
        view_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)

        def view(image, key):
            return self.preprocessing.random_view(
                image, key, self._image_size, flip=self._flip, colour=self._recipe.colour
            )

        logits = net(jax.vmap(view)(images, view_keys), dropout_keys=dropout_keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, jnp.argmax(logits, axis=-1) == labels

    def _tested_by_example(self, net, images, labels):
        """Returns loss, top-1, top-5 and 1 for each example; 0 where there is no label."""
        log_odds = answers(
            *(net, images, self.preprocessing),
            size=self._image_size,
            ten_crop=self._recipe.ten_crop,
        )
        there = labels >= 0
        own = jnp.take_along_axis(log_odds, jnp.maximum(labels, 0)[:, None], axis=1)
        # Among equal answers lower classes come first, as with argmax. An answer that is not a
        # number is not right: all others count as better.
        after = jnp.arange(log_odds.shape[1])[None] > labels[:, None]
        better = jnp.sum(~((log_odds < own) | ((log_odds == own) & after)), axis=1) - 1
        found = (-own[:, 0], better < 1, better < 5, there)
        return tuple(jnp.where(there, x.astype(jnp.float32), 0.0) for x in found)


def answers(
    net: Any, images: Any, preprocessing: Preprocessing, *, size: int, ten_crop: bool
) -> jax.Array:
    """Returns the logarithms of the probabilities of each class, (N, classes), as in tests."""
    if not ten_crop:
        return jax.nn.log_softmax(net(jax.vmap(lambda x: preprocessing.middle(x, size))(images)))
    crops = jax.vmap(lambda x: preprocessing.ten_crops(x, size), out_axes=1)(images)
    # One crop is computed after the other, so that a test needs no more memory than a step.
    log_odds = lax.map(lambda views: jax.nn.log_softmax(net(views)), crops)
    return jax.nn.logsumexp(log_odds, axis=0) - jnp.log(10.0)


def tower_net(
    config: AlexNetConfig,
    mesh: jax.sharding.Mesh,
    implementation: str | None,
    dtype: str = "float32",
) -> TowerNet:
    """Returns AlexNet with its towers divided over the mesh."""
    compute = None if dtype == "float32" else jnp.dtype(dtype)
    return TowerNet(
        lambda axis_size, rngs: AlexNet(
            config, axis_size=axis_size, implementation=implementation, dtype=compute, rngs=rngs
        ),
        mesh,
    )
