"""The shapes in the drawings: asked of the operation and of the net, which are traced, not run."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.extend.core import jaxprs_in_params

from grouped_conv_jax import count_multiply_adds, grouped_conv
from grouped_conv_jax.models import AlexNet, AlexNetConfig

LAYOUT = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One convolution of one example, channels last; the kernel is (rows, columns, inputs per
    group, outputs).
    """

    lhs: tuple[int, int, int]
    rhs: tuple[int, int, int, int]
    out: tuple[int, int, int]
    groups: int
    multiply_adds: int

    @property
    def inputs(self) -> int:
        """Of a group."""
        return self.rhs[2]

    @property
    def outputs(self) -> int:
        """Of a group."""
        return self.out[2] // self.groups


def convolution(size: int, features: int, taps: int, outputs: int, groups: int) -> Convolution:
    """A `grouped_conv` without padding of `size` x `size` pixels by kernels of `taps` x `taps`."""
    lhs = jax.ShapeDtypeStruct((1, size, size, features), "float32")
    rhs = jax.ShapeDtypeStruct((taps, taps, features // groups, outputs), "float32")

    def conv(lhs: Any, rhs: Any) -> jax.Array:
        return grouped_conv(
            lhs, rhs, (1, 1), "VALID", dimension_numbers=LAYOUT, feature_group_count=groups
        )

    out = jax.eval_shape(conv, lhs, rhs)
    return Convolution(
        lhs.shape[1:], rhs.shape, out.shape[1:], groups, count_multiply_adds(conv, lhs, rhs)
    )


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a net, of one example.

    Attributes:
      name: such as conv1 or fc6.
      lhs: shape of what it sees, without the batch.
      rhs: shape of its kernel.
      out: shape of what it puts out, before any pooling.
      groups: of a convolution; 1 for a fully connected layer.
      is_pooled: whether what it puts out is pooled before the next layer.
    """

    name: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    out: tuple[int, ...]
    groups: int
    is_pooled: bool

    @property
    def strides(self) -> int:
        """How many rows of the input there are for a row of the output."""
        return round(self.lhs[0] / self.out[0]) if len(self.out) > 1 else 1


def layers(config: AlexNetConfig) -> list[Layer]:
    """The convolutions and the fully connected layers of the net, in order."""
    net = nnx.eval_shape(lambda: AlexNet(config, rngs=nnx.Rngs(0)))
    images = (1, config.image_size, config.image_size, config.image_channels)
    graph, state = nnx.split(net)
    traced = jax.make_jaxpr(lambda state, images: nnx.merge(graph, state)(images))
    found: list[Layer] = []
    for equation in _equations(traced(state, jax.ShapeDtypeStruct(images, "float32")).jaxpr):
        kind = equation.primitive.name
        if kind == "reduce_window_max":
            found[-1] = dataclasses.replace(found[-1], is_pooled=True)
        elif kind in ("grouped_conv", "dot_general"):
            lhs, rhs = (x.aval.shape for x in equation.invars)
            found.append(
                Layer(
                    name=str(equation.source_info.name_stack).split("/")[-1],
                    lhs=lhs[1:],
                    rhs=rhs,
                    out=equation.outvars[0].aval.shape[1:],
                    groups=equation.params["spec"].feature_group_count
                    if kind == "grouped_conv"
                    else 1,
                    is_pooled=False,
                )
            )
    return found


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)
