"""The training steps of the example: the same losses on any devices, and no second compilation."""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_alexnet import TINY

from alexnet.config import Recipe
from alexnet.data.augmentation import Preprocessing
from alexnet.data.packaged import digits
from alexnet.data.pipeline import Batch, evaluation_batches, training_batches
from alexnet.data.sources import ArraySource
from alexnet.model_io.checkpoints import Checkpoints
from alexnet.training.state import TrainState
from alexnet.training.trainer import Trainer, answers, tower_net
from grouped_conv_jax.towers import PLACEMENTS, Placement, make_mesh

BATCH, STEPS = 16, 8


@pytest.fixture
def mixed_types() -> Iterator[None]:
    """For what flax and optax compute with numbers of several types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


RECIPE = Recipe(batch_size=BATCH, learning_rate=0.02, schedule="constant", warmup_epochs=0.0)

PREPROCESSING = Preprocessing(
    np.full(1, 80.0, np.float32), np.full(1, 80.0, np.float32), np.eye(1, dtype=np.float32)
)


@functools.cache
def images(size: int = 36):
    return digits(size, seed=0)


def trainer(
    data: int,
    group: int,
    *,
    towers: int = 2,
    flip: bool = False,
    placement: Placement = "shard_map",
    recipe: Recipe = RECIPE,
) -> Trainer:
    config = dataclasses.replace(TINY, towers=towers, num_classes=10, image_channels=1)
    return Trainer(
        tower_net(config, make_mesh(data, group), None, recipe.dtype),
        recipe,
        PREPROCESSING,
        image_size=32,
        steps=STEPS,
        steps_per_epoch=4,
        flip=flip,
        seed=5,
        placement=placement,
    )


def train(run: Trainer, state: TrainState, steps: int, first: int = 0):
    losses = []
    with training_batches(
        images().train, batch_size=BATCH, rows=run.rows(BATCH), seed=0, first_step=first, workers=0
    ) as batches:
        for batch in itertools.islice(batches, steps):
            state, metrics = run.step(state, *run.put(batch, BATCH))
            losses.append(float(metrics.loss))
    return state, losses


@functools.cache
def losses_of_one_device(towers: int = 2) -> list[float]:
    run = trainer(1, 1, towers=towers)
    return train(run, run.init(), STEPS)[1]


on_each_mesh = pytest.mark.parametrize(
    ("data", "group", "towers"),
    [
        (2, 2, 2),
        pytest.param(1, 2, 2, marks=pytest.mark.slow),
        pytest.param(1, 4, 4, marks=pytest.mark.slow),
        pytest.param(4, 1, 2, marks=pytest.mark.slow),
    ],
)


@pytest.mark.parametrize(
    "placement", ["jit", *(pytest.param(p, marks=pytest.mark.slow) for p in ("shard_map", "pmap"))]
)
@on_each_mesh
def test_the_losses_are_those_of_one_device(data, group, towers, placement):
    run = trainer(data, group, towers=towers, placement=placement)
    state, losses = train(run, run.init(), STEPS)
    np.testing.assert_allclose(losses, losses_of_one_device(towers), rtol=2e-4)
    assert len(set(losses)) == STEPS
    assert int(state.step) == STEPS


def bytes_by_device(tree: Any) -> dict[Any, int]:
    """Bytes that each device really holds of the arrays in `tree`."""
    held = defaultdict(int)
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return dict(held)


@pytest.mark.slow
def test_a_device_holds_the_optimizer_state_of_its_towers_only():
    alone, spread = (bytes_by_device(trainer(1, group).init().opt_state) for group in (1, 2))
    assert len(spread) == 2
    assert max(spread.values()) < 0.51 * sum(alone.values())


def log_odds(net, images, *, ten_crop: bool = False):
    return answers(net, images, PREPROCESSING, size=32, ten_crop=ten_crop)


def evaluation(run: Trainer, state: TrainState, source, batch_size: int):
    with evaluation_batches(
        source, batch_size=batch_size, rows=run.rows(batch_size), workers=0
    ) as batches:
        return run.evaluate(state, batches, batch_size)


@pytest.mark.slow
def test_every_image_is_tested_once():
    run = trainer(2, 2)
    state = run.init()
    source = images().test
    chosen, labels = zip(*(source[i] for i in range(90)), strict=True)
    some = ArraySource(np.stack(chosen), np.stack(labels), "")
    whole = evaluation(run, state, some, 90)
    np.testing.assert_allclose(evaluation(run, state, some, 50), whole, rtol=1e-5)
    net = run.net.whole(jax.device_get(state.params))
    found = np.asarray(log_odds(net, some.images), np.float64)
    own = found[np.arange(90), some.labels]
    rank = (found > own[:, None]).sum(axis=1)
    np.testing.assert_allclose(
        whole, (-own.mean(), (rank < 1).mean(), (rank < 5).mean()), rtol=1e-5
    )
    assert 0 < whole.top1 < whole.top5 < 1


def test_a_net_of_nothing_that_is_a_number_is_never_right():
    run = trainer(1, 1)
    state = run.init()
    broken = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), state.params)
    tested = evaluation(run, state._replace(params=broken), images().test, 359)
    assert (tested.top1, tested.top5) == (0, 0)
    assert np.isnan(tested.loss)


@pytest.mark.slow
def test_ten_crops_are_averaged():
    """Over their probabilities, as in the paper: the mean of ten answers of the middle."""
    run = trainer(1, 1)
    image = images().test[0][0]
    net = run.net.whole(jax.device_get(run.init().params))
    crops = [image[top:, left:][:32, :32] for top, left in [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2)]]
    crops += [crop[:, ::-1] for crop in crops]
    each = np.exp(log_odds(net, np.stack(crops)))
    assert len(np.unique(each[:, 0])) == 10
    np.testing.assert_allclose(
        np.exp(log_odds(net, image[None], ten_crop=True))[0], each.mean(0), rtol=1e-5
    )


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_other_devices_and_in_another_placement(tmp_path):
    stages: list[tuple[int, int, Placement]] = [(1, 2, "pmap"), (2, 1, "jit"), (2, 2, "shard_map")]
    losses = []
    for data, group, placement in stages:
        run = trainer(data, group, placement=placement)
        state = run.init()
        checkpoints = Checkpoints(tmp_path)
        if losses:
            like = jax.tree.map(lambda x: x.sharding, state)
            state = checkpoints.restore_newest(state)
            assert jax.tree.map(lambda x: x.sharding, state) == like
        assert int(state.step) == len(losses)
        state, more = train(run, state, 2, first=len(losses))
        losses += more
        checkpoints.save(state)
        checkpoints.close()
    np.testing.assert_allclose(losses, losses_of_one_device()[: len(losses)], rtol=2e-4)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_is_lowered_without_being_run(placement):
    run = trainer(2, 2, placement=placement)
    text = str(run.lower(BATCH, images().train.shape).as_text())
    assert "sdy.mesh" in text
    with pytest.raises(ValueError, match="a batch of 7 examples does not divide over the 2"):
        run.lower(7, images().train.shape)


def test_each_process_gives_what_its_devices_need():
    run = trainer(2, 2)
    assert run.rows(6) == list(range(6))
    batch = Batch(
        np.arange(24, dtype=np.uint8).reshape(6, 2, 2, 1),
        np.arange(6, dtype=np.int32),
        np.full(6, -1),
    )
    placed, labels = run.put(batch, 6)
    np.testing.assert_array_equal(placed, batch.images)
    assert {tuple(np.asarray(shard.data)) for shard in labels.addressable_shards} == {
        (0, 1, 2),
        (3, 4, 5),
    }


def changed(**settings) -> Recipe:
    return dataclasses.replace(RECIPE, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "group", "placement"),
    [(2, 1, "shard_map"), (1, 2, "jit")],
)
def test_a_batch_in_parts_is_the_same_batch(data, group, placement):
    run = trainer(data, group, placement=placement, recipe=changed(accumulate=4))
    _, losses = train(run, run.init(), 4)
    np.testing.assert_allclose(losses, losses_of_one_device()[:4], rtol=2e-4)


def scaled(loss_scale, scale: float):
    like = loss_scale.scale
    return loss_scale.replace(scale=jax.device_put(np.float32(scale), like.sharding))


@pytest.mark.slow
@pytest.mark.usefixtures("mixed_types")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_learn_as_thirty_two(dtype):
    run = trainer(1, 2, recipe=changed(dtype=dtype))
    state = run.init()
    if state.loss_scale:
        state = state._replace(loss_scale=scaled(state.loss_scale, 2.0**8))
    state, losses = train(run, state, STEPS)
    kept = jax.tree.leaves((state.params, state.opt_state))
    assert {x.dtype for x in kept if x.ndim} == {np.dtype(np.float32)}
    assert losses != losses_of_one_device()
    np.testing.assert_allclose(losses, losses_of_one_device(), rtol=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("mixed_types")
def test_a_step_that_is_too_large_for_float16_changes_the_scale_only():
    run = trainer(1, 1, recipe=changed(dtype="float16"))
    state = run.init()
    before = jax.device_get(state.params)
    state = state._replace(loss_scale=scaled(state.loss_scale, 2.0**40))
    state, losses = train(run, state, 1)
    assert np.isfinite(losses[0])
    chex.assert_trees_all_equal(jax.device_get(state.params), before)
    assert int(state.step) == 1
    assert float(state.loss_scale.scale) == 2.0**39
    # Until it fits: then it learns.
    state, _ = train(run, state, 39, first=1)
    assert float(state.loss_scale.scale) < 2.0**30
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(jax.device_get(state.params), before)


@pytest.mark.slow
def test_the_running_mean_is_that_of_the_parameters():
    run = trainer(1, 2, recipe=changed(ema=0.9))
    state = run.init()
    mean = np.asarray(state.params["classes"]["kernel"], np.float64)
    for step in range(3):
        state, _ = train(run, state, 1, first=step)
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * np.asarray(state.params["classes"]["kernel"])
    np.testing.assert_allclose(state.average["classes"]["kernel"], mean, rtol=1e-5, atol=1e-8)
    # It is what is tested.
    tested = evaluation(run, state, images().test, 359)
    assert tested == evaluation(run, state._replace(params=state.average), images().test, 359)
    assert tested != evaluation(run, state._replace(average=()), images().test, 359)


@pytest.mark.slow
def test_the_epochs_sums_begin_anew():
    run = trainer(1, 1)
    state, losses = train(run, run.init(), 3)
    np.testing.assert_allclose(state.epoch.loss, sum(losses), rtol=1e-6)
    state, more = train(run, state, 3, first=3)
    np.testing.assert_allclose(state.epoch.loss, sum(more[1:]), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("mixed_types")
def test_the_learning_rate_is_divided_when_the_error_stalls():
    run = trainer(1, 1, recipe=changed(schedule="plateau", patience=2, most_drops=2))
    state, scales = run.init(), []
    for error in (0.5, 0.4, 0.41, 0.4, 0.42, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3):
        state = run.after_test(state, error)
        scales.append(round(float(state.plateau.scale), 6))
    assert scales == [1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.01]
    before = jax.device_get(state.params)
    slow, _ = train(run, state, 1)
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), slow.params, before)
    fresh, _ = train(run, run.init(), 1)
    fast = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), fresh.params, before)
    chex.assert_trees_all_close(moved, jax.tree.map(lambda x: 0.01 * x, fast), rtol=1e-2)
