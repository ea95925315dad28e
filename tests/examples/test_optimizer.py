"""The recipe's optimizer and schedules against the equations, in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet.config import Recipe
from alexnet.training import optimizer

RECIPE = Recipe(learning_rate=0.1, schedule="constant", warmup_epochs=0.0, momentum=0.9)

PARAMS = {"kernel": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.asarray([1.0, 2.0])}
GRADS = {"kernel": jnp.asarray([[0.3, 0.1], [-0.2, 0.4]]), "bias": jnp.asarray([-0.5, 0.25])}


def trained(recipe: Recipe, scales) -> dict[str, np.ndarray]:
    """The parameters after a step with the same gradients for each scale of the rate."""
    rule = optimizer.optimizer(recipe)
    params, state = PARAMS, rule.init(PARAMS)
    for scale in scales:
        updates, state = rule.update(GRADS, state, params, learning_rate=jnp.float32(0.1 * scale))
        params = jax.tree.map(jnp.add, params, updates)
    return jax.tree.map(np.asarray, params)


def by_hand(name: str, scales, *, decay=5e-4, rate=0.1, momentum=0.9, trust=0.0) -> np.ndarray:
    """Section 5 of the paper: v = 0.9 v - 0.0005 lr w - lr g; w = w + v."""
    w, g = (np.asarray(x[name], np.float64) for x in (PARAMS, GRADS))
    v = np.zeros_like(w)
    for scale in scales:
        step = g + decay * w
        if trust:
            step *= trust * np.linalg.norm(w) / np.linalg.norm(step)
        v = momentum * v - rate * scale * step
        w = w + v
    return w


SCALES = (1.0, 1.0, 0.1, 0.1)


def test_the_learning_rate_is_inside_the_momentum():
    found = trained(RECIPE, SCALES)
    for name in PARAMS:
        np.testing.assert_allclose(found[name], by_hand(name, SCALES), rtol=1e-6)
    # Outside of it, as in optax.sgd, the drop would be another path.
    w, v = np.asarray(PARAMS["bias"], np.float64), 0.0
    for scale in SCALES:
        v = 0.9 * v + np.asarray(GRADS["bias"]) + 5e-4 * w
        w = w - 0.1 * scale * v
    assert np.abs(w - found["bias"]).max() > 1e-3


def test_biases_at_twice_the_rate_and_without_decay():
    found = trained(dataclasses.replace(RECIPE, bias_rate=2.0, decay_biases=False), SCALES)
    np.testing.assert_allclose(found["kernel"], by_hand("kernel", SCALES), rtol=1e-6)
    np.testing.assert_allclose(found["bias"], by_hand("bias", SCALES, decay=0, rate=0.2), rtol=1e-6)


def test_lars_is_for_kernels():
    found = trained(dataclasses.replace(RECIPE, lars=0.01), SCALES)
    np.testing.assert_allclose(found["kernel"], by_hand("kernel", SCALES, trust=0.01), rtol=1e-5)
    np.testing.assert_allclose(found["bias"], by_hand("bias", SCALES), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1] * 8),
        ({"warmup_epochs": 1.0}, [0, 0.05] + [0.1] * 6),
        ({"schedule": "steps", "drop_epochs": (1.0, 3.0)}, [0.1] * 2 + [0.01] * 4 + [0.001] * 2),
        (
            {"schedule": "steps", "drop_epochs": (2.0,), "warmup_epochs": 1.0},
            [0, 0.05, 0.1, 0.1] + [0.01] * 4,
        ),
        ({"schedule": "cosine"}, [0.05 * (1 + np.cos(np.pi * i / 8)) for i in range(8)]),
        ({"schedule": "plateau"}, [0.1] * 8),
    ],
    ids=str,
)
def test_the_learning_rate_by_steps(settings, expected):
    # The schedules mix types.
    with jax.numpy_dtype_promotion("standard"):
        rate = optimizer.learning_rate(dataclasses.replace(RECIPE, **settings), 8, 2)
        found = [float(jnp.asarray(rate(step))) for step in range(8)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
