"""Transformations of sharded convolutions."""

import jax
import jax.numpy as jnp
from jax import lax


def wave(conv):
    return lambda x, w: jnp.sum(jnp.sin(conv(x, w)))


def grad_of_grad(conv):
    def norm(x, w):
        return sum(jnp.sum(g**2) for g in jax.grad(wave(conv), (0, 1))(x, w))

    return jax.grad(norm, (0, 1))


def remat(conv):
    return jax.grad(wave(jax.checkpoint(conv)), (0, 1))


def scan(conv):
    def loss(x, w):
        def body(total, x):
            return total + wave(conv)(x, w), None

        return lax.scan(body, jnp.zeros(()), jnp.stack([x, -x, 2 * x]))[0]

    return jax.grad(loss, (0, 1))


def forward_mode(conv):
    return lambda x, w: jax.jvp(jax.grad(wave(conv), (0, 1)), (x, w), (w.sum() * x, w))[1]


def per_example(conv):
    return jax.vmap(jax.grad(lambda x, w: wave(conv)(x[None], w), (0, 1)), (0, None))


def ensemble(conv):
    return lambda x, w: jax.vmap(jax.grad(wave(conv), (0, 1)), (None, 0))(x, jnp.stack([w, 2 * w]))


TRANSFORMED = (grad_of_grad, remat, scan, forward_mode, per_example, ensemble)
