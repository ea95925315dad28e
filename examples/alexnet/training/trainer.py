"""The training state, the program that each device runs, and the steps made of it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.dynamic_scale import DynamicScale
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from alexnet.config import Recipe
from alexnet.data.augmentation import Preprocessing
from alexnet.data.pipeline import Batch
from alexnet.errors import UsageError
from alexnet.training import optimizer
from alexnet.training.state import Evaluation, Metrics, TrainState
from grouped_conv_jax.models import AlexNet, AlexNetConfig
from grouped_conv_jax.parallel.pmap import Pmap
from grouped_conv_jax.towers import DATA, Placement, TowerNet


class Trainer:
    """Trains one net on one mesh.

    Args:
      net: the towers on their devices.
      recipe: how to train.
      preprocessing: of the images.
      image_size: pixels along an edge that the net sees, cropped out of the images given.
      steps: all steps of the run.
      steps_per_epoch: after how many of them an epoch begins.
      flip: whether to train on mirrored images too.
      seed: of the weights, crops and dropout.
      placement: how the net comes to its devices, see `TowerNet.by_example`; the losses do not
        depend on it.
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
            # Of all of JAX's generators the one whose numbers do not depend on the devices.
            jax.random.key(seed, impl="threefry2x32")
        )
        replicated = NamedSharding(net.mesh, PartitionSpec())
        self._everywhere = jax.jit(lambda x: x, out_shardings=replicated)
        self._finite = jax.jit(
            lambda params: jnp.stack([jnp.isfinite(p).all() for p in jax.tree.leaves(params)]).all()
        )
        self._told = jax.jit(lambda state, error: self._plateau.update({}, state, value=error)[1])
        tested = net.by_example(self._tested_by_example, placement)
        self._test: Any = lambda params, *batch: jax.tree.map(jnp.sum, tested(params, *batch))
        # The batch's shape is constant, so a second trace would mean a second compilation. chex
        # counts the traces of all trainers together.
        chex.clear_trace_counter()
        once = chex.assert_max_traces(n=1)
        self._train_step: Any
        if placement == "pmap":
            by_example = PartitionSpec(DATA)
            state = self._state(net.specs, PartitionSpec())
            self._train_step = Pmap(
                once(self._step_on_device),
                net.mesh,
                in_specs=(state, by_example, by_example),
                out_specs=(state, PartitionSpec()),
                donate_argnums=(0,),
            )
        else:
            self._train_step = jax.jit(once(self._step), donate_argnums=0)
            self._test = jax.jit(self._test)
            self._forward = net.by_example(self._scores, placement)

    def init(self, params: Any = None) -> TrainState:
        """The state before the first step, the same on every mesh and in every placement.

        Args:
          params: to begin with, instead of random ones.
        """
        if params is not None:
            params = jax.device_put(params, self.net.shardings)
        first = jax.jit(self._first_state, out_shardings=self._shardings)
        return first(self._init_key, params)

    def step(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One step on a batch of `put`; `state` is used up."""
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

    def told(self, state: TrainState, error: float) -> TrainState:
        """The state after an evaluation: the learning rate may be divided."""
        if self._recipe.schedule != "plateau":
            return state
        return state._replace(plateau=self._told(state.plateau, jnp.float32(error)))

    def rate(self, step: int, scale: float) -> float:
        """The learning rate after `step` steps, divided as the plateau's scale says."""
        return float(jnp.asarray(self._schedule(step))) * scale

    def everywhere(self, array: jax.Array) -> jax.Array:
        """A whole array, such as a kernel, on every device."""
        return self._everywhere(array)

    def finite(self, state: TrainState) -> bool:
        """Whether every number of the parameters is one."""
        return bool(self._finite(state.params))

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(self._first_state, self._init_key, None),
            self._shardings,
        )

    def lower(self, batch_size: int, image_shape: tuple[int, ...]) -> jax.stages.Lowered:
        """The training step, neither compiled nor run, for batches of images of one shape."""
        batch = self._abstract_batch(batch_size, image_shape)
        return self._train_step.lower(self.abstract_state, *batch)

    def compile(self, batch_size: int, image_shape: tuple[int, ...]) -> None:
        """Compiles ahead of time what `step` and `evaluate` will run; not for pmap."""
        batch = self._abstract_batch(batch_size, image_shape)
        self._train_step.lower(self.abstract_state, *batch).compile()
        self._test.lower(self.abstract_state.params, *batch).compile()

    def rows(self, batch_size: int) -> Sequence[int]:
        """Which of a batch's examples the devices of this process need."""
        self.net.check_batch(batch_size)
        needed = self.net.examples.addressable_devices_indices_map((batch_size,)).values()
        return sorted({row for part in needed if part for row in range(batch_size)[part[0]]})

    def put(self, batch: Batch, batch_size: int) -> tuple[jax.Array, jax.Array]:
        """Images and labels on their devices, of the batch's `rows` that are this process's."""
        place = {row: index for index, row in enumerate(self.rows(batch_size))}

        def put(array: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                # The devices' parts are ranges, and so are they among the rows.
                own = range(batch_size)[index[0]]
                return array[place[own[0]] : place[own[-1]] + 1]

            return jax.make_array_from_callback(
                (batch_size, *array.shape[1:]), self.net.examples, part
            )

        return put(batch.images), put(batch.labels)

    def _abstract_batch(
        self, batch_size: int, image_shape: tuple[int, ...]
    ) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        self.net.check_batch(batch_size)
        examples = self.net.examples
        images = jax.ShapeDtypeStruct((batch_size, *image_shape), np.uint8, sharding=examples)
        return images, jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=examples)

    # The state. The optimizer's moments lie where the parameters do that they belong to.

    def _first_state(self, key: jax.Array, params: Any) -> TrainState:
        params = self.net.init(key) if params is None else params
        scaled = self._recipe.dtype == "float16"
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self._optimizer.init(params),
            average=params if self._recipe.ema else (),
            plateau=self._plateau.init({}),
            loss_scale=_loss_scale() if scaled else (),
            epoch=Metrics(jnp.zeros(()), jnp.zeros(())),
        )

    @property
    def _shardings(self) -> TrainState:
        everywhere = NamedSharding(self.net.mesh, PartitionSpec())
        return self._state(self.net.shardings, everywhere)

    def _state(self, by_param: Any, other: Any) -> TrainState:
        """A state of what belongs to each parameter, and of `other` where that is none."""
        state = jax.eval_shape(self._first_state, self._init_key, None)
        others = jax.tree.map(lambda _: other, state)
        opt_state = optax.tree_map_params(
            self._optimizer,
            lambda _, belongs: belongs,
            state.opt_state,
            by_param,
            transform_non_params=lambda _: other,
        )
        return others._replace(
            params=by_param, opt_state=opt_state, average=by_param if state.average else ()
        )

    # A step, as the computation of the whole net.

    def _step(
        self, state: TrainState, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, Metrics]:
        keys = self._keys(state, len(labels))

        def mean_loss(params, images, labels, keys):
            losses, right = self._forward(params, images, labels, keys)
            return jnp.mean(losses), jnp.mean(right)

        def gradients(loss_scale, *batch):
            if loss_scale:
                loss_scale, finite, (loss, accuracy), grads = loss_scale.value_and_grad(
                    mean_loss, has_aux=True
                )(state.params, *batch)
                return loss_scale, (finite, loss, accuracy, grads)
            (loss, accuracy), grads = jax.value_and_grad(mean_loss, has_aux=True)(
                state.params, *batch
            )
            return loss_scale, (True, loss, accuracy, grads)

        parts = self._parts((images, labels, keys))
        loss_scale, (finite, loss, accuracy, grads) = self._accumulated(
            gradients, state.loss_scale, parts
        )
        metrics = Metrics(loss, accuracy)
        new = self._updated(state, grads, metrics)
        if loss_scale:
            # A step whose gradients were too large for float16 changes nothing but the scale.
            kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
            new = kept._replace(step=new.step, epoch=new.epoch, loss_scale=loss_scale)
        return new, metrics

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
        metrics = Metrics(*(lax.psum(jnp.sum(x), DATA) / batch for x in scores))
        return self._updated(state, self.net.sum_gradients(grads), metrics), metrics

    def _parts(self, arrays: Any) -> Any:
        """The batch in the parts that are computed one after the other, as a leading dimension.

        A part has the same share of every device's examples, so that none are sent.
        """
        count, devices = self._recipe.accumulate, self.net.mesh.shape[DATA]

        def parts(array: jax.Array) -> jax.Array:
            by_device = array.reshape(devices, count, -1, *array.shape[1:])
            return by_device.swapaxes(0, 1).reshape(count, -1, *array.shape[1:])

        return jax.tree.map(parts, arrays)

    def _accumulated(self, gradients: Callable, loss_scale: Any, parts: Any) -> tuple[Any, Any]:
        """The means over the parts of what `gradients` gives, and whether all are finite."""
        if self._recipe.accumulate == 1:
            return gradients(loss_scale, *jax.tree.map(lambda x: x[0], parts))
        shapes = jax.eval_shape(
            lambda scale, parts: gradients(scale, *jax.tree.map(lambda x: x[0], parts))[1],
            loss_scale,
            parts,
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1:])

        def add(carry, part):
            loss_scale, finite, sums = carry
            loss_scale, (now, *values) = gradients(loss_scale, *part)
            return (loss_scale, finite & now, jax.tree.map(jnp.add, sums, tuple(values))), None

        (loss_scale, finite, sums), _ = lax.scan(add, (loss_scale, jnp.bool_(True), zeros), parts)
        means = jax.tree.map(lambda x: x / self._recipe.accumulate, sums)
        return loss_scale, (finite, *means)

    def _keys(self, state: TrainState, batch: int) -> jax.Array:
        """A key for each example of the step's batch."""
        return jax.random.split(jax.random.fold_in(self._step_key, state.step), batch)

    def _updated(self, state: TrainState, grads: Any, metrics: Metrics) -> TrainState:
        # By the steps that were made, also those that float16 has skipped.
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

    # Of each example, by the whole net or by that of a device's towers.

    def _scores(self, net, images, labels, keys):
        """The loss of each example, and whether the answer is right."""
        view_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)

        def view(image, key):
            return self.preprocessing.random_view(
                image, key, self._image_size, flip=self._flip, colour=self._recipe.colour
            )

        logits = net(jax.vmap(view)(images, view_keys), dropout_keys=dropout_keys)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses, jnp.argmax(logits, axis=-1) == labels

    def _tested_by_example(self, net, images, labels):
        """Loss, whether the first and the first five answers are right, and 1; 0 without label."""
        log_odds = self.answers(net, images)
        there = labels >= 0
        own = jnp.take_along_axis(log_odds, jnp.maximum(labels, 0)[:, None], axis=1)
        # Of equal answers, those of lower classes come first, as with argmax. What is not a number
        # is not right: all others count as better.
        after = jnp.arange(log_odds.shape[1])[None] > labels[:, None]
        better = jnp.sum(~((log_odds < own) | ((log_odds == own) & after)), axis=1) - 1
        found = (-own[:, 0], better < 1, better < 5, there)
        return tuple(jnp.where(there, x.astype(jnp.float32), 0.0) for x in found)

    def answers(self, net: Any, images: jax.Array | np.ndarray) -> jax.Array:
        """The logarithms of the probabilities of each class, (N, classes), as they are tested."""
        size, prepared = self._image_size, self.preprocessing
        if not self._recipe.ten_crop:
            return jax.nn.log_softmax(net(jax.vmap(lambda x: prepared.middle(x, size))(images)))
        crops = jax.vmap(lambda x: prepared.ten_crops(x, size), out_axes=1)(images)
        # One after the other, so that a test needs no more memory than a step.
        answers = lax.map(lambda views: jax.nn.log_softmax(net(views)), crops)
        return jax.nn.logsumexp(answers, axis=0) - jnp.log(10.0)


def _loss_scale() -> DynamicScale:
    # Arrays, as all of the state, where it would begin with Python's numbers.
    return DynamicScale().replace(fin_steps=jnp.int32(0), scale=jnp.float32(2.0**15))


def tower_net(
    config: AlexNetConfig,
    mesh: jax.sharding.Mesh,
    implementation: str | None,
    dtype: str = "float32",
) -> TowerNet:
    """AlexNet with its towers spread over the mesh."""
    compute = None if dtype == "float32" else jnp.dtype(dtype)
    return TowerNet(
        lambda axis_size, rngs: AlexNet(
            config, axis_size=axis_size, implementation=implementation, dtype=compute, rngs=rngs
        ),
        mesh,
    )
