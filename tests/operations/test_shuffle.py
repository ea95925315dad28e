"""The channel shuffle: which feature goes where, its inverse and gradient, PyTorch's, meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import random
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from grouped_conv_jax import grouped_conv
from grouped_conv_jax.operations.shuffle import channel_shuffle

SHAPES = [((6,), 0), ((2, 3, 12), -1), ((2, 12, 3), 1), ((12, 1, 2), -3), ((0, 12), 1), ((2, 0), 1)]


def shuffled(x: np.ndarray, groups: int, axis: int) -> np.ndarray:
    """From the definition, feature by feature."""
    size = x.shape[axis] // groups
    source = [g * size + i for i in range(size) for g in range(groups)]
    return np.take(x, source, axis)


@pytest.mark.parametrize(
    "groups", [2, *[pytest.param(groups, marks=pytest.mark.slow) for groups in (1, 3, 6)]]
)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_which_feature_goes_where(shape, axis, groups):
    x = random("x", shape, np.float32)
    out = channel_shuffle(x, groups, axis)
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(out, shuffled(x, groups, axis))
    if shape[axis]:
        back = channel_shuffle(out, shape[axis] // groups, axis)
        np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize(
    "dtype",
    ["bool", *[pytest.param(d, marks=pytest.mark.slow) for d in ("int8", "bfloat16", "complex64")]],
)
def test_any_dtype(dtype):
    x = jnp.arange(12).reshape(2, 6).astype(dtype)
    out = channel_shuffle(x, 3)
    assert out.dtype == x.dtype
    np.testing.assert_array_equal(out, shuffled(np.asarray(x), 3, -1))


def test_each_group_of_the_next_convolution_sees_each_group_of_the_last():
    x = random("x", (2, 5, 12), np.float32)
    w = random("w", (1, 4, 6), np.float32)
    arguments: dict[str, Any] = dict(
        window_strides=(1,),
        padding="VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=3,
    )

    def loss(x):
        out = grouped_conv(channel_shuffle(x, 3), w, **arguments)
        # Of the first of the three groups only.
        return out[..., :2].sum(), out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(x)
    expected = oracle.forward(shuffled(x, 3, -1), w, **arguments)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    seen = np.abs(gradient).sum((0, 1)) > 0
    np.testing.assert_array_equal(
        seen, [True, True, False, False] + 2 * [True, False, False, False]
    )


@pytest.mark.parametrize(
    "sharding",
    [
        P("data", None, "model"),
        pytest.param(P(None, None, ("data", "model")), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_sharding_stays(kind, sharding):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind,) * 2)
    x = random("x", (2, 3, 16), np.float32)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, sharding))

        def loss(x):
            out = channel_shuffle(x, 4)
            assert kind == AxisType.Auto or jax.typeof(out).sharding.spec == sharding
            return (out * channel_shuffle(x, 2)).sum(), out

        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(placed)
    np.testing.assert_array_equal(out, shuffled(x, 4, -1))
    expected = shuffled(shuffled(x, 4, -1), 8, -1) + shuffled(shuffled(x, 2, -1), 4, -1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    if kind == AxisType.Explicit:
        assert gradient.sharding.spec == out.sharding.spec == sharding


def test_inside_a_shard_map_it_is_that_of_a_device():
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    x = random("x", (4, 6), np.float32)
    spread = jax.shard_map(
        lambda x: channel_shuffle(x, 3), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    np.testing.assert_array_equal(jax.jit(spread)(x), shuffled(x, 3, -1))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_it_is_that_of_pytorch(rank):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    x = random("x", (2, 12, *[3] * (rank - 1), 2), np.float32)
    expected = torch.nn.functional.channel_shuffle(torch.from_numpy(x), 4)
    np.testing.assert_array_equal(channel_shuffle(x, 4, axis=1), expected.numpy())


@pytest.mark.parametrize(
    ("x", "groups", "axis", "error", "parts"),
    [
        (np.ones((2, 6)), 4, -1, ValueError, ["=4", "axis -1 of x", "(6)", "1, 2, 3, 6"]),
        (np.ones((2, 6)), 0, -1, ValueError, ["feature_group_count", "at least 1", "0"]),
        (np.ones((2, 6)), 2.0, -1, TypeError, ["feature_group_count", "integer", "2.0"]),
        (np.ones((2, 6)), True, -1, TypeError, ["feature_group_count", "True"]),
        (np.ones((2, 6)), 2, 2, ValueError, ["axis=2", "2 dimensions"]),
        (np.ones((2, 6)), 2, -3, ValueError, ["axis=-3", "2 dimensions"]),
        (np.ones((2, 6)), 2, 1.0, TypeError, ["axis", "integer", "1.0"]),
        (np.float32(1), 1, -1, ValueError, ["axis=-1", "0 dimensions"]),
        ([1.0, 2.0], 2, 0, TypeError, ["x must be an array", "list", "jnp.asarray"]),
    ],
)
def test_what_is_wrong_is_told(x, groups, axis, error, parts):
    with pytest.raises(error) as raised:
        channel_shuffle(x, groups, axis)
    for part in parts:
        assert part in str(raised.value)
