"""Arrays of 64 bits: called, differentiated and lowered in different `jax.enable_x64` contexts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NHWC, random
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from grouped_conv_jax import (
    grouped_conv,
    grouped_conv_input_grad,
    grouped_conv_kernel_grad,
    grouped_conv_local,
    grouped_conv_mixed,
    grouped_conv_patches,
    grouped_conv_transpose,
    streaming_conv,
)

GROUPS = {"dimension_numbers": NHWC, "feature_group_count": 2}
SHAPE, KERNEL = (2, 6, 6, 4), (3, 3, 2, 4)
# The operation, and the shapes of its operands.
OPERATIONS = {
    "grouped_conv": (lambda x, w: grouped_conv(x, w, (1, 1), "SAME", **GROUPS), SHAPE, KERNEL),
    "REFLECT": (lambda x, w: grouped_conv(x, w, (2, 1), "REFLECT", **GROUPS), SHAPE, KERNEL),
    "CIRCULAR": (lambda x, w: grouped_conv(x, w, (2, 1), "CIRCULAR", **GROUPS), SHAPE, KERNEL),
    "REPLICATE": (lambda x, w: grouped_conv(x, w, (1, 2), "REPLICATE", **GROUPS), SHAPE, KERNEL),
    "transpose": (
        lambda x, w: grouped_conv_transpose(x, w, (2, 2), "SAME", **GROUPS),
        SHAPE,
        KERNEL,
    ),
    "input_grad": (
        lambda w, y: grouped_conv_input_grad(SHAPE, w, y, (1, 1), "SAME", **GROUPS),
        KERNEL,
        SHAPE,
    ),
    "kernel_grad": (
        lambda x, y: grouped_conv_kernel_grad(x, KERNEL, y, (1, 1), "SAME", **GROUPS),
        SHAPE,
        SHAPE,
    ),
    "mixed": (
        lambda x, w: grouped_conv_mixed(
            x, [w[..., :2], w[..., 2:]], (1, 1), "SAME", dimension_numbers=NHWC
        ),
        SHAPE,
        KERNEL,
    ),
    "streaming": (
        lambda x, w: streaming_conv(x, w, feature_group_count=2)[0],
        (2, 6, 4),
        (3, 2, 4),
    ),
    # JAX itself does not transpose the padding and the product of these outside the context.
    "patches": (
        lambda x: grouped_conv_patches(x, (3, 3), (1, 1), "SAME", dimension_numbers=NHWC),
        SHAPE,
    ),
    "local": (
        lambda x, w: grouped_conv_local(x, w, (1, 1), "SAME", (3, 3), **GROUPS),
        SHAPE,
        (6, 6, 18, 4),
    ),
}
ONLY_FORWARD = ("patches", "local")


def operands_of(name):
    operation, *shapes = OPERATIONS[name]
    with jax.enable_x64(True):
        return operation, [jnp.asarray(random(str(s), s, np.float64)) for s in shapes]


def assert_equal(one, other):
    assert one.dtype == other.dtype == np.float64
    np.testing.assert_allclose(one, other, 1e-12, 1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_call_outside_the_context(name, jit):
    operation, operands = operands_of(name)
    with jax.enable_x64(True):
        expected = operation(*operands)
    assert_equal((jax.jit(operation) if jit else operation)(*operands), expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("where", ["call inside, gradient outside", "both outside"])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ONLY_FORWARD])
def test_a_gradient_outside_the_context(name, where):
    operation, operands = operands_of(name)
    with jax.enable_x64(True):
        out, vjp = jax.vjp(operation, *operands)
        cotangent = jnp.asarray(random("y", out.shape, np.float64))
        expected = vjp(cotangent)
    if where == "both outside":
        out, vjp = jax.vjp(operation, *operands)
    for one, other in zip(vjp(cotangent), expected, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ONLY_FORWARD])
def test_a_context_within_jit(name):
    operation, operands = operands_of(name)

    def loss(*operands):
        with jax.enable_x64(True):
            out = operation(*(x.astype("float64") for x in operands))
            return (out**2).sum().astype("float32")

    narrow = [np.asarray(x, np.float32) for x in operands]
    value, gradients = jax.jit(jax.value_and_grad(loss, tuple(range(len(narrow)))))(*narrow)
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in narrow]
        expected = jax.value_and_grad(
            lambda *o: (operation(*o) ** 2).sum(), tuple(range(len(wide)))
        )(*wide)
    for one, other in zip(
        jax.tree.leaves((value, gradients)), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, 1e-5, 1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    mesh = jax.make_mesh((2,), ("batch",), (kind,))
    operation, operands = operands_of("grouped_conv")
    with jax.enable_x64(True):
        out, vjp = jax.vjp(operation, *operands)
        cotangent = jnp.asarray(random("y", out.shape, np.float64))
        expected = (out, *vjp(cotangent))
        sharded = NamedSharding(mesh, P("batch"))
        x, y = (jax.device_put(a, sharded) for a in (operands[0], cotangent))
        w = jax.device_put(operands[1], NamedSharding(mesh, P()))

    @jax.jit
    def contractions(x, w, y):
        out, vjp = jax.vjp(operation, x, w)
        return out, *vjp(y)

    for one, other in zip(contractions(x, w, y), expected, strict=True):
        assert_equal(one, other)

    def narrow(x, w, y):
        with jax.enable_x64(True):
            found = contractions(*(a.astype("float64") for a in (x, w, y)))
            return [a.astype("float32") for a in found]

    operands = [jax.device_put(np.asarray(a, np.float32), a.sharding) for a in (x, w, y)]
    for one, other in zip(jax.jit(narrow)(*operands), expected, strict=True):
        np.testing.assert_allclose(one, other, 1e-4, 1e-4)


def test_a_program_of_32_bits_within_a_context():
    x, w = random("x", SHAPE, np.float32), random("w", KERNEL, np.float32)

    def conv(x, w):
        return grouped_conv(x, w, (2, 2), "SAME", **GROUPS)

    expected = jax.vjp(conv, x, w)[1](jnp.ones((2, 3, 3, 4)))
    with jax.enable_x64(True):
        found = jax.vjp(conv, jnp.asarray(x), jnp.asarray(w))[1](jnp.ones((2, 3, 3, 4), "float32"))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, 1e-5, 1e-5)
