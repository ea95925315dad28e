"""What is counted of a traced function, how often, and what is not; the parameters of layers."""

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.experimental import pallas
from jax.sharding import PartitionSpec

import grouped_conv_jax.linen
import grouped_conv_jax.nnx
from grouped_conv_jax import count_multiply_adds, grouped_conv
from grouped_conv_jax.counting import count_bytes, count_flops, count_parameters
from grouped_conv_jax.towers import make_mesh

X, W = jnp.ones((2, 4, 5, 5)), jnp.ones((6, 2, 3, 3))
ONE = 2 * 5 * 5 * 6 * 2 * 3 * 3


def conv(x, w):
    return grouped_conv(x, w, (1, 1), "SAME", feature_group_count=2)


def test_a_convolution_and_its_gradients():
    assert count_multiply_adds(conv, X, W) == ONE

    def loss(x, w):
        return conv(x, w).sum()

    assert count_multiply_adds(jax.jit(jax.grad(loss, argnums=1)), X, W) == 2 * ONE
    assert count_multiply_adds(jax.grad(loss, argnums=(0, 1)), X, W) == 3 * ONE


def test_a_matrix_product():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    assert count_multiply_adds(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b) == 360


def test_a_matrix_product_of_ragged_groups_and_its_gradients():
    rows, matrices = jnp.ones((6, 4)), jnp.ones((3, 4, 5))

    def product(rows, matrices):
        return jax.lax.ragged_dot(rows, matrices, jnp.array([1, 3, 2], jnp.int32))

    assert count_multiply_adds(product, rows, matrices) == 6 * 4 * 5
    assert count_bytes(product, rows, matrices) == 4 * (6 * 4 + 3 * 4 * 5 + 3 + 6 * 5)

    def loss(rows, matrices):
        return product(rows, matrices).sum()

    assert count_multiply_adds(jax.grad(loss, (0, 1)), rows, matrices) == 3 * 6 * 4 * 5


def test_a_scaled_matrix_product():
    a, b = jnp.ones((2, 3, 32), jnp.bfloat16), jnp.ones((2, 32, 5), jnp.bfloat16)
    scale = jnp.ones((2, 3, 1), jnp.bfloat16)
    product = functools.partial(jax.lax.scaled_dot, lhs_scale=scale)
    assert count_multiply_adds(product, a, b) == 2 * 3 * 32 * 5


def test_a_scan_counts_as_often_as_it_runs():

    def scan(x, w):
        return jax.lax.scan(lambda c, _: (c, conv(c, w)), x, None, length=7)

    assert count_multiply_adds(scan, X, W) == 7 * ONE


def test_of_two_branches_the_dearer():
    def branches(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: conv(conv(x, w)[:, :4], w), lambda: conv(x, w))

    assert count_multiply_adds(branches, X, W) == 2 * ONE


def test_one_device_of_a_shard_map():
    examples = PartitionSpec("data")
    spread = jax.shard_map(
        conv, mesh=make_mesh(2, 1), in_specs=(examples, PartitionSpec()), out_specs=examples
    )
    assert count_multiply_adds(spread, X, W) == ONE // 2


def test_what_cannot_be_counted_is_refused():
    def forever(x, w):
        return jax.lax.while_loop(lambda x: True, lambda x: conv(x, w)[:, :4], x)

    with pytest.raises(NotImplementedError, match="multiply-adds of while"):
        count_multiply_adds(forever, X, W)
    kernel = pallas.pallas_call(
        lambda x, w, out: out.__setitem__(..., x[...] @ w[...]),
        out_shape=jax.ShapeDtypeStruct((8, 4), jnp.float32),
        grid=(2,),
        in_specs=[
            pallas.BlockSpec((4, 4), lambda i: (i, 0)),
            pallas.BlockSpec((4, 4), lambda i: (0, 0)),
        ],
        out_specs=pallas.BlockSpec((4, 4), lambda i: (i, 0)),
    )
    with pytest.raises(NotImplementedError, match="multiply-adds of pallas_call"):
        count_multiply_adds(kernel, jnp.ones((8, 4)), jnp.ones((4, 4)))
    with pytest.raises(NotImplementedError, match="convolve with grouped_conv"):
        count_multiply_adds(lambda x, w: jax.lax.conv(x, w[:, :, :1], (1, 1), "SAME"), X[:, :2], W)


def test_a_loop_without_multiply_adds_is_nothing():

    def loop(x):
        return jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x)

    assert count_multiply_adds(loop, 0) == 0


# Operations and bytes.

BYTES = 4 * (X.size + W.size + 2 * 5 * 5 * 6)


def gradient(x, w):
    return jax.grad(lambda x, w: conv(x, w).sum(), argnums=(0, 1))(x, w)


def scan(x, w):
    return jax.lax.scan(lambda c, _: (c, conv(c, w)), x, None, length=7)


def branches(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: conv(conv(x, w)[:, :4], w), lambda: conv(x, w))


def over_kernels(x, w):
    return jax.vmap(conv, (None, 0))(x, jnp.stack([w, w, w]))


def over_examples(x, w):
    return jax.vmap(conv, (0, None))(jnp.stack([x, x, x]), w)


@pytest.mark.parametrize(
    ("function", "times", "nbytes"),
    [
        (conv, 1, BYTES),
        (gradient, 3, 3 * BYTES),
        (jax.checkpoint(conv), 1, BYTES),
        (scan, 7, 7 * BYTES),
        (branches, 2, 2 * BYTES),
        # What is not mapped is there once.
        (over_kernels, 3, 4 * (X.size + 3 * W.size + 3 * 2 * 5 * 5 * 6)),
        (over_examples, 3, 4 * (3 * X.size + W.size + 3 * 2 * 5 * 5 * 6)),
    ],
)
def test_operations_and_bytes(function, times, nbytes):
    assert count_multiply_adds(function, X, W) == times * ONE
    assert count_flops(function, X, W) == 2 * times * ONE
    assert count_bytes(function, X, W) == nbytes


def test_bytes_of_a_matrix_product_are_those_of_its_dtypes():
    a, b = jnp.ones((3, 4, 5), jnp.bfloat16), jnp.ones((3, 5, 6), jnp.bfloat16)

    def product(a, b):
        return jax.lax.dot_general(
            a, b, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
        )

    assert count_bytes(product, a, b) == 2 * (a.size + b.size) + 4 * 3 * 4 * 6


def test_numbers_of_four_bits_are_half_a_byte():
    # As many as do not fill their last byte.
    a, b = (jax.ShapeDtypeStruct(shape, jnp.int4) for shape in ((3, 5), (5, 7)))

    def product(a, b):
        return jax.lax.dot(a, b, preferred_element_type=jnp.int32)

    assert count_bytes(product, a, b) == 8 + 18 + 4 * 3 * 7


def test_operations_of_complex_numbers():
    x, w = X.astype(jnp.complex64), W.astype(jnp.complex64)
    assert count_multiply_adds(conv, x, w) == ONE
    assert count_flops(conv, x, w) == 8 * ONE
    assert count_flops(jnp.matmul, jnp.ones((2, 3), complex), jnp.ones((3, 4), complex)) == 8 * 24
    assert count_flops(jnp.matmul, jnp.ones((2, 3), jnp.int32), jnp.ones((3, 4), jnp.int32)) == 48


def test_bytes_of_one_device_of_a_shard_map():
    examples = PartitionSpec("data")
    spread = jax.shard_map(
        conv, mesh=make_mesh(2, 1), in_specs=(examples, PartitionSpec()), out_specs=examples
    )
    assert count_bytes(spread, X, W) == 4 * (X.size // 2 + W.size + 5 * 5 * 6)
    assert count_flops(spread, X, W) == ONE


@pytest.mark.parametrize(
    ("count", "name"),
    [(count_multiply_adds, "multiply-adds"), (count_flops, "FLOPs"), (count_bytes, "bytes")],
)
def test_what_cannot_be_counted_is_told_by_its_name(count, name):
    with pytest.raises(NotImplementedError, match=f"cannot count the {name} of conv_general"):
        count(lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME"), X[:, :2], W)


# Layers of Flax.

ZEROS = nnx.initializers.zeros
LAYER: Any = dict(kernel_size=(3, 3), feature_group_count=2, kernel_init=ZEROS)


class Net(nnx.Module):
    """A convolution, a normalisation with a state, and twice the same linear layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = grouped_conv_jax.nnx.GroupedConv(4, 6, **LAYER, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.linear = nnx.Linear(6, 6, kernel_init=ZEROS, rngs=rngs)
        self.again = self.linear

    def __call__(self, x):
        return self.again(self.linear(self.dropout(self.norm(self.conv(x)))))


NET_PARAMETERS = (3 * 3 * 2 * 6 + 6) + 2 * 6 + (6 * 6 + 6)
IMAGE = jax.ShapeDtypeStruct((2, 5, 5, 4), jnp.float32)


@pytest.mark.parametrize("make", [nnx.eval_shape, lambda build: build()], ids=["abstract", "real"])
def test_a_module_of_nnx(make):
    net = make(lambda: Net(nnx.Rngs(0)))
    multiply_adds = ONE + 2 * 2 * 5 * 5 * 6 * 6
    assert count_multiply_adds(net, IMAGE) == multiply_adds
    assert count_flops(net, IMAGE) == 2 * multiply_adds
    elements = 2 * 5 * 5 * (4 + 6) + 3 * 3 * 2 * 6 + 2 * (2 * 5 * 5 * (6 + 6) + 6 * 6)
    assert count_bytes(net, IMAGE) == 4 * elements
    # As an argument, with its gradient: none for the image.
    if make is not nnx.eval_shape:
        training = nnx.grad(lambda net, x: net(x).sum())
        assert count_multiply_adds(training, net, IMAGE) == 2 * ONE + 6 * 2 * 5 * 5 * 6 * 6
    assert count_parameters(net) == NET_PARAMETERS
    assert count_parameters(nnx.state(net)) == NET_PARAMETERS
    assert count_parameters(nnx.state(net, nnx.Param)) == NET_PARAMETERS
    assert count_parameters(nnx.state(net, nnx.BatchStat)) == 0
    assert count_parameters({"net": [net], "more": np.ones((2, 5))}) == NET_PARAMETERS + 10
    assert count_parameters(net.conv.kernel) == 3 * 3 * 2 * 6


def test_a_module_of_linen():
    class LinenNet(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = grouped_conv_jax.linen.GroupedConv(6, **LAYER)(x)
            return linen.BatchNorm(use_running_average=True)(x)

    net = LinenNet()
    variables = jax.eval_shape(net.init, jax.random.key(0), IMAGE)
    assert count_multiply_adds(net.apply, variables, IMAGE) == ONE
    assert count_flops(net.apply, variables, IMAGE) == 2 * ONE
    parameters = 3 * 3 * 2 * 6 + 6 + 2 * 6
    assert count_parameters(variables) == parameters
    assert count_parameters(variables["params"]) == parameters
    assert count_parameters(linen.FrozenDict(variables)) == parameters
    with pytest.raises(TypeError, match="got a LinenNet; of a linen module it is what init"):
        count_parameters(net)


@pytest.mark.parametrize("shape", [(2, 5, 5, 4), [2, 5, 5, 4]])
def test_a_shape_is_no_array(shape):
    layer = grouped_conv_jax.nnx.GroupedConv(4, 6, **LAYER, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"jax.ShapeDtypeStruct\(\(2, 5, 5, 4\), jnp.float32\)"):
        count_multiply_adds(layer, shape)
    # But a tree of numbers is one of arrays.
    assert count_multiply_adds(lambda tree: jnp.zeros(3) @ jnp.zeros(3) * tree[0], (2, 5)) == 3


def test_the_parameters_of_a_tree():
    assert count_parameters([]) == count_parameters(None) == 0
    assert count_parameters({"a": [X, (W,)], "b": IMAGE, "c": None}) == X.size + W.size + 200
    assert count_parameters(np.float32(1)) == 1
    for wrong, message in {
        2: "got a int",
        "weights.npz": "got a str",
        np.float32: "got a type",
    }.items():
        with pytest.raises(TypeError, match=message):
            count_parameters(wrong)
    with pytest.raises(TypeError, match=r"got a float at \['a'\]\[0\]"):
        count_parameters({"a": [1.0]})


def test_counting_does_not_import_flax():
    program = """if True:
        import sys
        import jax.numpy as jnp
        import numpy as np
        from grouped_conv_jax import counting
        assert counting.count_parameters([np.ones((2, 3))]) == 6
        assert counting.count_flops(jnp.dot, np.ones((2, 3)), np.ones((3, 4))) == 48
        assert "flax" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True)
