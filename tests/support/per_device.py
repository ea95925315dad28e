"""A convolution for programs that are written per device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import NHWC, Case
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

GROUPS = 4


CASE = Case(
    "sharded",
    (8, 5, 6, 8),
    (3, 2, 2, 12),
    {
        "window_strides": (2, 1),
        "padding": "SAME",
        "dimension_numbers": NHWC,
        "feature_group_count": GROUPS,
    },
)


BATCHED = P("data", None, None, "group")


KERNEL = P(None, None, None, "group")


def mesh(kind: AxisType = AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "group"), axis_types=(kind, kind))


def wave(conv):
    return lambda x, w: jnp.sum(jnp.sin(conv(x, w)))


@functools.cache
def second_order_of_lax():
    x, w, _ = CASE.random()
    return jax.jit(second_order(CASE.lax_conv()))(x, w)


def second_order(conv):
    """The gradient of the norm of the gradient."""

    def norm(x, w):
        return sum(jnp.sum(g**2) for g in jax.grad(wave(conv), (0, 1))(x, w))

    return jax.grad(norm, (0, 1))


def assert_second_order(actual) -> None:
    length = max(oracle.lengths(*CASE.shapes, **CASE.arguments)) ** 2
    for a, e in zip(actual, second_order_of_lax(), strict=True):
        oracle.assert_close(a, np.asarray(e), length)
