"""Multiply-adds of a traced function: what is counted, how often, and what is not."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from grouped_conv_jax import count_multiply_adds, grouped_conv
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
    with pytest.raises(NotImplementedError, match="convolve with grouped_conv"):
        count_multiply_adds(lambda x, w: jax.lax.conv(x, w[:, :, :1], (1, 1), "SAME"), X[:, :2], W)


def test_a_loop_without_multiply_adds_is_nothing():

    def loop(x):
        return jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x)

    assert count_multiply_adds(loop, 0) == 0
