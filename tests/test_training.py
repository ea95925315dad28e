"""The training steps of the example: the same losses on any devices, and no second compilation."""

import dataclasses
import functools
import itertools
from collections import defaultdict
from typing import Any

import jax
import numpy as np
import pytest
from test_alexnet import TINY

from alexnet.checkpoints import Checkpoints
from alexnet.data import Split, batches, digits, padded_batches
from alexnet.errors import UsageError
from alexnet.training import Normalization, Trainer, paper_optimizer, tower_net
from grouped_conv_jax.towers import PLACEMENTS, Placement, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, STEPS = 16, 8


@pytest.fixture(scope="module")
def dataset():
    return digits(36, seed=0)


def trainer(
    dataset,
    data: int,
    group: int,
    *,
    towers: int = 2,
    flip: bool = False,
    placement: Placement = "shard_map",
) -> Trainer:
    config = dataclasses.replace(TINY, towers=towers, num_classes=10, image_channels=1)
    return Trainer(
        tower_net(config, make_mesh(data, group), implementation=None),
        paper_optimizer(0.02, 0.9, 5e-4),
        image_size=32,
        normalization=Normalization.of(dataset.train.images),
        flip=flip,
        seed=5,
        placement=placement,
    )


def train(run: Trainer, state, dataset, steps: int, first: int = 0):
    losses = []
    epoch = batches(dataset.train, BATCH, seed=0, epoch=0)
    for batch in itertools.islice(epoch, first, first + steps):
        state, metrics = run.step(state, batch)
        losses.append(float(metrics.loss))
    return state, losses


@functools.cache
def losses_of_one_device(towers: int = 2) -> list[float]:
    dataset = digits(36, seed=0)
    run = trainer(dataset, 1, 1, towers=towers)
    return train(run, run.init(), dataset, STEPS)[1]


each_placement = pytest.mark.parametrize(
    "placement",
    [pytest.param(p, marks=pytest.mark.slow if p == "pmap" else ()) for p in PLACEMENTS],
)
on_each_mesh = pytest.mark.parametrize(
    ("data", "group", "towers"),
    [
        (2, 2, 2),
        pytest.param(1, 2, 2, marks=pytest.mark.slow),
        pytest.param(1, 4, 4, marks=pytest.mark.slow),
        pytest.param(4, 1, 2, marks=pytest.mark.slow),
    ],
)


@each_placement
@on_each_mesh
def test_the_losses_are_those_of_one_device(dataset, data, group, towers, placement):
    run = trainer(dataset, data, group, towers=towers, placement=placement)
    state, losses = train(run, run.init(), dataset, STEPS)
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


def test_a_device_holds_the_optimizer_state_of_its_towers_only(dataset):
    alone, spread = (
        bytes_by_device(trainer(dataset, 1, group).init().opt_state) for group in (1, 2)
    )
    assert len(spread) == 2
    assert max(spread.values()) < 0.51 * sum(alone.values())


def test_a_second_batch_shape_is_not_compiled_in_silence(dataset):
    run = trainer(dataset, 1, 2)
    state, _ = train(run, run.init(), dataset, 2)
    other = next(batches(dataset.train, BATCH // 2, seed=0, epoch=0))
    with pytest.raises(AssertionError, match="traced"):
        run.step(state, other)


def test_accuracy_counts_every_image_once(dataset):
    run = trainer(dataset, 2, 2)
    params = run.init().params
    whole = run.accuracy(params, dataset.test, len(dataset.test) + 1)
    assert run.accuracy(params, dataset.test, 50) == pytest.approx(whole)
    assert 0 < whole < 1


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_other_devices_and_in_another_placement(dataset, tmp_path):
    stages: list[tuple[int, int, Placement]] = [(1, 2, "pmap"), (2, 1, "jit"), (2, 2, "shard_map")]
    losses = []
    for data, group, placement in stages:
        run = trainer(dataset, data, group, placement=placement)
        state = run.init()
        checkpoints = Checkpoints(tmp_path)
        if losses:
            like = jax.tree.map(lambda x: x.sharding, state)
            state = checkpoints.restore_newest(state)
            assert jax.tree.map(lambda x: x.sharding, state) == like
        assert int(state.step) == len(losses)
        state, more = train(run, state, dataset, 2, first=len(losses))
        losses += more
        checkpoints.save(state)
        checkpoints.close()
    np.testing.assert_allclose(losses, losses_of_one_device()[: len(losses)], rtol=2e-4)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_step_is_lowered_without_being_run(dataset, placement):
    run = trainer(dataset, 2, 2, placement=placement)
    text = str(run.lower(BATCH, dataset.train.images.shape[1:]).as_text())
    assert "sdy.mesh" in text
    with pytest.raises(ValueError, match="a batch of 7 examples does not divide over the 2"):
        run.lower(7, dataset.train.images.shape[1:])


def test_without_a_checkpoint_there_is_nothing_to_resume(dataset, tmp_path):
    run = trainer(dataset, 1, 1)
    with pytest.raises(UsageError, match="nothing to resume: no checkpoint in"):
        Checkpoints(tmp_path / "empty").restore_newest(run.init())


def test_crops_and_flips_are_of_the_image(dataset):
    run = trainer(dataset, 1, 1, flip=True)
    image = np.arange(36 * 36, dtype=np.uint8).reshape(36, 36, 1)
    seen = set()
    for key in jax.random.split(jax.random.key(0), 200):
        crop = np.asarray(run._random_crop(image, key))
        found = [
            (top, left, flip)
            for top, left, flip in itertools.product(range(5), range(5), (False, True))
            if np.array_equal(
                crop, image[top : top + 32, left : left + 32][:, :: -1 if flip else 1]
            )
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 45


def test_normalization_leaves_mean_0_and_deviation_1(dataset):
    norm = Normalization.of(dataset.train.images)
    run = trainer(dataset, 1, 1)
    images = np.asarray(run._normalize(dataset.train.images))
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3
    assert norm.mean.shape == norm.std.shape == (1,)


def test_padding_completes_the_last_batch():
    split = Split(np.ones((5, 2, 2, 1), np.uint8), np.arange(5, dtype=np.int32))
    labels = [batch.labels.tolist() for batch in padded_batches(split, 3)]
    assert labels == [[0, 1, 2], [3, 4, -1]]
