"""What the report says of the training step, in each placement and as devices grow."""

import numpy as np
import pytest
from small_alexnet import TINY

from alexnet.config import Recipe
from alexnet.data.augmentation import Preprocessing
from alexnet.reports.placement_report import training_report
from alexnet.training.trainer import Trainer, tower_net
from grouped_conv_jax.towers import DATA, GROUP, Placement, make_mesh

EXAMPLES = 4


def trainer(data: int, group: int, placement: Placement = "shard_map") -> Trainer:
    return Trainer(
        tower_net(TINY, make_mesh(data, group), None),
        Recipe(schedule="constant", warmup_epochs=0.0),
        Preprocessing(np.zeros(3, np.float32), np.ones(3, np.float32), np.eye(3, dtype=np.float32)),
        image_size=32,
        steps=1,
        steps_per_epoch=1,
        flip=False,
        seed=0,
        placement=placement,
    )


def report(data: int, group: int, placement: Placement = "shard_map", **options):
    run = trainer(data, group, placement)
    return training_report(run, TINY, run.init(), data * EXAMPLES, (36, 36, 3), **options)


def moved(report, axis):
    return sum(row.compiled_nbytes for row in report.rows if row.axes == (axis,))


@pytest.mark.slow
@pytest.mark.parametrize(("data", "group"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 2)])
def test_shard_map_moves_what_was_computed_and_nothing_else(data, group):
    found = report(data, group)
    assert found.notes == ()
    assert all(row.compiled_nbytes == row.computed_nbytes > 0 for row in found.rows)
    assert {row.layer for row in found.rows if row.axes == (GROUP,)} == {
        "conv3",
        "fc6",
        "fc7",
        "fc8",
    }


@pytest.mark.slow
def test_jit_moves_no_more():
    """A sum may be an all-reduce where a reduce-scatter is enough, of the same bytes."""
    found = report(2, 2, "jit")
    assert not any(row.excess for row in found.rows)
    assert all(note.endswith("all-reduce instead of reduce-scatter") for note in found.notes)


@pytest.mark.slow
def test_pmap_sums_the_gradient_of_the_logits_once_more():
    """Its sum has a sum for a transpose, and the last bias has a copy on each device."""
    found = report(2, 2, "pmap")
    logits, bias = EXAMPLES * TINY.num_classes * 4, TINY.num_classes * 4
    excess = {(row.layer, row.axes): row.excess for row in found.rows if row.excess}
    assert excess.pop(("fc8", (GROUP,))) == logits
    assert [(axes, n) for (_, axes), n in excess.items()] == [((DATA, GROUP), bias)]


@pytest.mark.slow
def test_memory_against_one_device():
    found = report(1, 2, alone=lambda: trainer(1, 1))
    assert [m.name for m in found.memory][:2] == ["parameters", "optimizer state"]
    for m in found.memory:
        assert m.alone is not None
        assert 0.4 * m.alone < m.nbytes < 0.7 * m.alone
