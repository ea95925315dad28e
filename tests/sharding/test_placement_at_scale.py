"""The figures of training steps compiled for TPU topologies, and the page that is made of them.

Compiling them takes an hour, so that these tests read the committed result file, and lower one net
without compiling it.
"""

import dataclasses
import json

import data_parallel
import numpy as np
import placement_at_scale
import pytest
from jax.sharding import AxisType, Mesh
from placement_at_scale import Options, Step

from alexnet.training.topology import topology_devices

ROWS = json.loads(Options().results.read_text())
SEVERAL = [row for row in ROWS if row["devices"] > 1]


def named(row) -> str:
    return "-".join(str(row[field.name]) for field in dataclasses.fields(Step))


def test_the_page_is_made_of_the_committed_figures():
    assert Options().page.read_text() == placement_at_scale.page(ROWS)


@pytest.mark.parametrize("row", SEVERAL, ids=named)
def test_a_device_computes_its_share(row):
    share = float(placement_at_scale.share(row, ROWS))
    assert share == pytest.approx(1 / row["mesh"].get("group", 1), rel=0.1)


@pytest.mark.parametrize("row", SEVERAL, ids=named)
def test_no_collective_runs_over_several_axes(row):
    assert row["other_axes"] == []


@pytest.mark.parametrize("row", SEVERAL, ids=named)
def test_a_program_exchanges_what_was_computed(row):
    """Beyond it: the statistics of batch normalisation, and what XLA gathers twice under jit.

    XLA:TPU may send the features of a float32 net in bfloat16, as it multiplies them.
    """
    if (row["net"], row["placement"], row["dtype"]) == ("alexnet", "shard_map", "bfloat16"):
        assert row["compiled_bytes"] == row["computed_bytes"]
    else:
        assert row["compiled_bytes"] <= 1.1 * row["computed_bytes"]


def test_what_a_device_exchanges_does_not_grow_with_the_devices():
    for row in SEVERAL:
        others = (
            other["compiled_bytes"]
            for other in SEVERAL
            if all(row[name] == other[name] for name in ("net", "dtype", "placement"))
            and other["device_kind"] == row["device_kind"]
        )
        assert max(others) <= 1.02 * row["compiled_bytes"]


def test_each_generation_and_dtype_has_a_device_alone():
    pytest.importorskip("libtpu", reason="needs libtpu, which is for Linux x86-64")
    options = Options(nets=("mobilenet",), topologies=("v5e:2x2", "v5e:4x4", "v6e:2x4"))
    steps = list(placement_at_scale.steps(options))
    for dtype in options.dtypes:
        alone = [s.topology for s in steps if s.devices == 1 and s.dtype == dtype]
        assert alone == ["v5e:2x2", "v6e:2x4"]
    assert len(steps) == 2 * (2 + 3 * 2)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["jit", "shard_map"])
def test_a_data_parallel_step_is_lowered_for_a_topology(placement):
    pytest.importorskip("libtpu", reason="needs libtpu, which is for Linux x86-64")
    mesh = Mesh(np.array(topology_devices("v5e:2x2")), ("data",), axis_types=(AxisType.Auto,))
    lowered = data_parallel.lower_step("mobilenet", "float32", mesh, placement, 8)
    images = lowered.args_info[0][3]
    assert images.shape == (32, 224, 224, 3)
    (exchange,) = data_parallel.exchanges("mobilenet", "float32", 4)
    assert exchange.nbytes == 4 * 4_231_976 + 4
