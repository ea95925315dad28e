"""Derivatives of several orders."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from cases import (
    Case,
)


def derivatives(conv):
    """Of (x, w, dx, dw, y): derivatives of conv, and of a function that is nonlinear in it."""

    def wave(x, w):
        return jnp.sum(jnp.sin(conv(x, w)))

    gradient = jax.grad(wave, (0, 1))

    def along(x, w, dx, dw):
        return jax.jvp(wave, (x, w), (dx, dw))[1]

    def against(x, w, dx, dw):
        return sum(jnp.vdot(a, b) for a, b in zip(gradient(x, w), (dx, dw), strict=True))

    def over_kernels(x, w):
        return jax.lax.scan(lambda sum, w: (sum + wave(x, w), conv(x, w)), 0.0, w)

    def compute(x, w, dx, dw, y):
        return {
            "value": conv(x, w),
            "jvp": jax.jvp(conv, (x, w), (dx, dw)),
            "jvp of the input only": jax.jvp(lambda x: conv(x, w), (x,), (dx,)),
            "jvp of the kernel only": jax.jvp(lambda w: conv(x, w), (w,), (dw,)),
            "vjp": jax.vjp(conv, x, w)[1](y),
            "linearize": jax.linearize(conv, x, w)[1](dx, dw),
            "transpose in the input": jax.linear_transpose(lambda x: conv(x, w), x)(y),
            "transpose in the kernel": jax.linear_transpose(lambda w: conv(x, w), w)(y),
            "gradient": gradient(x, w),
            "forward over reverse": jax.jvp(gradient, (x, w), (dx, dw))[1],
            "reverse over forward": jax.grad(along, (0, 1, 2, 3))(x, w, dx, dw),
            "reverse over reverse": jax.grad(against, (0, 1, 2, 3))(x, w, dx, dw),
            "forward over forward": jax.jvp(along, (x, w, dx, dw), (dx, dw, x, w))[1],
            "checkpoint": jax.grad(jax.checkpoint(wave), (0, 1))(x, w),
            "scan": over_kernels(x, jnp.stack([w, dw])),
            "gradient of scan": jax.grad(lambda *xw: over_kernels(*xw)[0], (0, 1))(
                x, jnp.stack([w, dw])
            ),
        }

    return jax.jit(compute)


def operands(case: Case):
    x, w, y = case.random(np.float64)
    dx, dw, _ = case.random(np.float64, stack=(1,))
    return x, w, dx[0], dw[0], y


def assert_equal_derivatives(actual, expected, case: Case) -> None:
    # A derivative of second order is a convolution of convolutions: the products of the longest
    # sums of each, and of the third order once more.
    length = max(case.lengths) ** 3
    assert actual.keys() == expected.keys()
    for name in actual:
        pairs = zip(jax.tree.leaves(actual[name]), jax.tree.leaves(expected[name]), strict=True)
        for a, e in pairs:
            oracle.assert_close(a, np.asarray(e), length, name=name)
