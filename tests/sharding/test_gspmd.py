"""The partition under GSPMD, JAX's former partitioner, for as long as JAX has the switch."""

import jax
import numpy as np
import pytest
from cases import named
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    CONTRACTIONS,
    SOME,
    SPLITS,
    assert_local,
    assert_right,
    make_mesh,
    random_spec,
    resized,
)

from grouped_conv_jax import grouped_conv
from grouped_conv_jax.collectives import collectives

pytestmark = pytest.mark.skipif(
    not hasattr(jax.config, "jax_use_shardy_partitioner"), reason="JAX has Shardy only"
)


@pytest.fixture(autouse=True)
def gspmd(jax_setting):
    jax_setting("jax_use_shardy_partitioner", False)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_batch_and_groups_are_local(case, split):
    assert_local(case, split, None)


@pytest.mark.parametrize("case", named("rank 1", "NHWC"), ids=lambda c: c.name)
def test_random_shardings(case):
    draw = np.random.default_rng(len(case.name))
    for sizes in ({"a": 2, "b": 2, "c": 2}, {"a": 4, "b": 2}):
        mesh = make_mesh(**sizes)
        one = resized(case, draw)
        assert_right(one, mesh, [random_spec(shape, mesh, draw) for shape in one.shapes])


def test_the_sharding_of_a_result_follows_from_the_operands():
    mesh = make_mesh(data=4, group=2)
    x = jax.ShapeDtypeStruct(
        (8, 16, 6, 6), np.float32, sharding=NamedSharding(mesh, P("data", "group"))
    )
    w = jax.ShapeDtypeStruct((16, 2, 3, 3), np.float32, sharding=NamedSharding(mesh, P("group")))

    def network(x, w):
        x = grouped_conv(x, w, (1, 1), "SAME", feature_group_count=8)
        return grouped_conv(x * 2, w, (1, 1), "SAME", feature_group_count=8)

    program = jax.jit(network).lower(x, w).compile()
    assert program.output_shardings.is_equivalent_to(x.sharding, 4)
    assert not collectives(program, mesh)


@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_an_explicit_mesh(contraction):
    mesh = jax.make_mesh((2, 2), ("data", "group"), (jax.sharding.AxisType.Explicit,) * 2)
    draw = np.random.default_rng(0)
    x, w = draw.normal(size=(4, 8, 5, 5)), draw.normal(size=(8, 2, 3, 3))

    def conv(x, w):
        return grouped_conv(x, w, (1, 1), "SAME", feature_group_count=4)

    def compute(x, w):
        out, vjp = jax.vjp(conv, x, w)
        return dict(zip(CONTRACTIONS, (out, *vjp(out)), strict=True))[contraction]

    x, w = x.astype(np.float32), w.astype(np.float32)
    expected = compute(x, w)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, P("data", "group")), jax.device_put(w, P("group"))
        np.testing.assert_allclose(jax.jit(compute)(*placed), expected, 1e-4, 1e-4)
