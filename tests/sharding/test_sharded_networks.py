"""Training steps of whole networks under plain jit: what their devices exchange, and the values.

Batches are split over some mesh axes and features over others. Then a grouped or depthwise
convolution exchanges nothing, and a dense one what follows from its sums: its whole input on every
device that shares the features, or the sums of its outputs over them, once forward and once
backward.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

from grouped_conv_jax import grouped_conv
from grouped_conv_jax.collectives import Collective, collectives

CHANNELS, WIDE, GROUPS = 32, 64, 16


def conv(x, w, stride: int = 1):
    groups = x.shape[-1] // w.shape[2]
    return grouped_conv(
        x,
        w,
        (stride, stride),
        "SAME",
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def resnext(x, p, stride: int):
    y = jax.nn.relu(conv(x, p["narrow"]))
    y = jax.nn.relu(conv(y, p["grouped"], stride))
    return jax.nn.relu(conv(y, p["wide"]) + conv(x, p["shortcut"], stride))


def convnext(x, p, stride: int):
    y = conv(x, p["depthwise"], stride)
    y = conv(jax.nn.gelu(conv(y, p["wide"])), p["narrow"])
    return y + conv(x, p["shortcut"], stride)


def efficientnet(x, p, stride: int):
    y = jax.nn.silu(conv(x, p["wide"]))
    y = jax.nn.silu(conv(y, p["depthwise"], stride))
    squeezed = jax.nn.silu(conv(jnp.mean(y, (1, 2), keepdims=True), p["squeeze"]))
    y = y * jax.nn.sigmoid(conv(squeezed, p["excite"]))
    return conv(y, p["narrow"]) + conv(x, p["shortcut"], stride)


@dataclasses.dataclass(frozen=True)
class Network:
    block: Callable
    kernels: dict[str, tuple[int, ...]]


SHORTCUT = {"shortcut": (1, 1, CHANNELS, CHANNELS)}
NETWORKS = {
    "ResNeXt": Network(
        resnext,
        {
            "narrow": (1, 1, CHANNELS, WIDE),
            "grouped": (3, 3, WIDE // GROUPS, WIDE),
            "wide": (1, 1, WIDE, CHANNELS),
            **SHORTCUT,
        },
    ),
    "ConvNeXt": Network(
        convnext,
        {
            "depthwise": (7, 7, 1, CHANNELS),
            "wide": (1, 1, CHANNELS, WIDE),
            "narrow": (1, 1, WIDE, CHANNELS),
            **SHORTCUT,
        },
    ),
    "EfficientNet": Network(
        efficientnet,
        {
            "wide": (1, 1, CHANNELS, WIDE),
            "depthwise": (5, 5, 1, WIDE),
            "squeeze": (1, 1, WIDE, 16),
            "excite": (1, 1, 16, WIDE),
            "narrow": (1, 1, WIDE, CHANNELS),
            **SHORTCUT,
        },
    ),
}

# The mesh, the axes of the batch, and those of the features.
MESHES = {
    "4 x 2": ({"data": 4, "group": 2}, ("data",), ("group",)),
    "2 x 2 x 2": ({"a": 2, "b": 2, "c": 2}, ("a", "b"), ("c",)),
    "2 x 2 x 2, features over two axes": ({"a": 2, "b": 2, "c": 2}, ("a",), ("b", "c")),
    "8 x 1": ({"data": 8, "group": 1}, ("data",), ("group",)),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step of a stem, two blocks (the second one with stride 2), and a classifier."""

    network: str
    mesh: Mesh
    batch: tuple[str, ...]
    features: tuple[str, ...]

    @classmethod
    def on(cls, network: str, mesh: str) -> "Step":
        axes, batch, features = MESHES[mesh]
        return cls(network, make_mesh(**axes), batch, features)

    @property
    def shapes(self) -> dict:
        kernels = NETWORKS[self.network].kernels
        return {
            "stem": (3, 3, 3, CHANNELS),
            "blocks": [kernels, kernels],
            "classifier": (CHANNELS, 10),
        }

    @functools.cached_property
    def arguments(self) -> tuple:
        def parameter(shape):
            spec = P(None, None, None, self.features) if len(shape) == 4 else P(self.features)
            return self._array(shape, spec)

        parameters = jax.tree.map(parameter, self.shapes, is_leaf=lambda x: isinstance(x, tuple))
        return parameters, self._array((16, 16, 16, 3), P(self.batch))

    def _array(self, shape, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(self.mesh, spec))

    def __call__(self, parameters, x):
        loss, gradients = jax.value_and_grad(self.loss)(parameters, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients), loss

    def loss(self, parameters, x):
        x = self._placed(jax.nn.relu(conv(x, parameters["stem"])))
        for i, block in enumerate(parameters["blocks"]):
            x = self._placed(NETWORKS[self.network].block(x, block, 1 + i))
        return jnp.mean((jnp.mean(x, (1, 2)) @ parameters["classifier"]) ** 2)

    def _placed(self, x):
        sharding = NamedSharding(self.mesh, P(self.batch, None, None, self.features))
        return jax.lax.with_sharding_constraint(x, sharding)

    def compiled(self):
        shardings = jax.tree.map(lambda x: x.sharding, self.arguments[0])
        return jax.jit(self, out_shardings=(shardings, None)).lower(*self.arguments).compile()

    def devices(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def parameters_bytes(self) -> int:
        sizes = [math.prod(x.shape) for x in jax.tree.leaves(self.arguments[0])]
        return 4 * sum(sizes) // self.devices(self.features)

    def dense_bytes(self) -> int:
        """Returns what the dense convolutions exchange: for each one, twice the smaller one of its
        input and its output, for the part of the batch that a device has.
        """
        total = 0
        jaxpr = jax.make_jaxpr(self.loss)(*self.arguments)
        for equation in equations(jaxpr.jaxpr):
            if equation.primitive.name == "grouped_conv":
                lhs, rhs, out = (v.aval for v in (*equation.invars, *equation.outvars))
                if lhs.shape[-1] == rhs.shape[2] and lhs.shape[-1] != 3:
                    total += 2 * 4 * min(lhs.size, out.size)
        return total // self.devices(self.batch)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from equations(value.jaxpr)


def over(axes: tuple[str, ...], found: list[Collective]) -> int:
    return sum(c.nbytes for c in found if set(c.axes) & {*axes})


def assert_moves_what_it_must(step: Step, capfd) -> None:
    program = step.compiled()
    assert "rematerialization" not in capfd.readouterr().err
    found = collectives(program, step.mesh)
    # The gradients of the parameters, and the loss.
    reduced = [c for c in found if set(c.axes) & {*step.batch}]
    assert {(c.kind, c.axes) for c in reduced} == {("all-reduce", step.batch)}
    assert over(step.batch, found) == step.parameters_bytes() + 4
    if step.devices(step.features) == 1:
        assert len(reduced) == len(found)
        return
    # Kernels that are sharded by outputs, and computed with by inputs, in each contraction; and the
    # logits.
    more = 3 * step.parameters_bytes() + 2 * 4 * 160
    assert over(step.features, found) <= step.dense_bytes() + more


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_training_step_moves_what_it_must(network, mesh, capfd):
    assert_moves_what_it_must(Step.on(network, mesh), capfd)


def test_a_movement_that_xla_has_no_way_for_would_be_seen(capfd):
    mesh = make_mesh(data=4, group=2)
    sharded, wanted = (NamedSharding(mesh, spec) for spec in (P("data"), P(None, "group")))
    x = jax.ShapeDtypeStruct((64, 64), np.float32, sharding=sharded)
    jax.jit(lambda x: x, out_shardings=wanted).lower(x).compile()
    assert "rematerialization" in capfd.readouterr().err


@pytest.mark.parametrize("mesh", ["4 x 2", "2 x 2 x 2, features over two axes"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_training_step_has_the_values_of_one_device(network, mesh):
    step = Step.on(network, mesh)
    draw = np.random.default_rng(0)
    arguments = jax.tree.map(
        lambda x: np.asarray(draw.normal(0, 0.1, x.shape), np.float32), step.arguments
    )
    placed = jax.device_put(arguments, jax.tree.map(lambda x: x.sharding, step.arguments))
    alone = dataclasses.replace(step, mesh=make_mesh(**dict.fromkeys(step.mesh.axis_names, 1)))
    expected, found = jax.jit(alone)(*arguments), jax.jit(step)(*placed)
    for e, f in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-4, atol=1e-6)
