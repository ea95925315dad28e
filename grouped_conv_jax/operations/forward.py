"""From the arguments of `grouped_conv` to its `ConvSpec`, and to what is done to the input before.

The gradients as operations take the same arguments, of the convolution that they are gradients of.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from grouped_conv_jax.operations import arguments
from grouped_conv_jax.operations.padding import Extension, resolved
from grouped_conv_jax.partitioning.explicit_mesh import with_auto_axes
from grouped_conv_jax.spec import ConvSpec, Role


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a convolution as a caller gives them: see `grouped_conv`.

    They are not checked yet. `forward` checks them together with the arrays.
    """

    window_strides: Any
    padding: Any
    lhs_dilation: Any = None
    rhs_dilation: Any = None
    dimension_numbers: Any = None
    feature_group_count: Any = 1
    batch_group_count: Any = 1
    precision: Any = None
    preferred_element_type: Any = None


@dataclasses.dataclass(frozen=True)
class Forward:
    """One convolution as it was asked for.

    Attributes:
      spec: the convolution proper, with feature groups only, and padded with zeros only.
      rearrange: makes feature groups of the batch groups of `lhs`; None if there are none.
      extension: puts what is not zeros beyond the ends of `lhs`.
    """

    spec: ConvSpec
    rearrange: Callable[[jax.Array], jax.Array] | None
    extension: Extension

    @property
    def changes_lhs(self) -> bool:
        return self.rearrange is not None or bool(self.extension.sides)

    def prepared(self, lhs: Any) -> Any:
        """Returns the lhs of `spec`, a linear function of the caller's lhs."""
        if self.rearrange is not None:
            lhs = with_auto_axes(self.rearrange, jax.typeof(lhs).sharding)(lhs)
        return self.extension(lhs)

    def sharding_of_prepared(self, sharding: NamedSharding) -> NamedSharding:
        """Returns the sharding of `spec`'s lhs, given the sharding of the caller's lhs."""
        if self.rearrange is not None:
            # The batch and the features have other sizes.
            return NamedSharding(sharding.mesh, PartitionSpec())
        return self.extension.sharding(sharding, len(self.spec.lhs_shape))


def forward(lhs: Any, rhs: Any, settings: Settings, *, result: Role = "out") -> Forward:
    """Checks the arguments of a convolution, and returns the convolution that they ask for.

    Args:
      lhs: the input, or its type.
      rhs: the kernel, or its type.
      settings: the settings.
      result: the array that the operation computes.

    Raises:
      ValueError, TypeError: an argument is wrong; the message says which and how to mend it.
    """
    batch_groups = arguments.group_count("batch_group_count", settings.batch_group_count)
    groups = arguments.group_count("feature_group_count", settings.feature_group_count)
    lhs, rhs = arguments.array_type("lhs", lhs), arguments.array_type("rhs", rhs)
    rearrange = None
    if batch_groups > 1:
        lhs, rearrange = _feature_groups(lhs, rhs, settings.dimension_numbers, groups, batch_groups)
        groups = batch_groups
    arguments.check_same_dtype(lhs=lhs, rhs=rhs)
    numbers = arguments.layout(lhs.shape, rhs.shape, settings.dimension_numbers)
    rank = lhs.ndim - 2
    strides = arguments.integers("window_strides", settings.window_strides, rank)
    lhs_dilation = arguments.integers("lhs_dilation", settings.lhs_dilation, rank, default=1)
    rhs_dilation = arguments.integers("rhs_dilation", settings.rhs_dilation, rank, default=1)
    arguments.check_groups(lhs.shape, rhs.shape, numbers, groups)
    padding = settings.padding
    if isinstance(padding, str) and any(d != 1 for d in lhs_dilation):
        raise ValueError(
            f"padding={padding!r} has no meaning with lhs_dilation={lhs_dilation}; "
            "give one (low, high) pair for each spatial dimension"
        )
    extended, pairs = resolved(
        padding,
        lhs.shape,
        numbers.lhs_spec[2:],
        arguments.windows(rhs.shape, numbers, rhs_dilation),
        strides,
        lhs_dilation,
    )
    lhs_shape = extended.shape(lhs.shape)
    precision = arguments.precision(settings.precision)
    spec = ConvSpec(
        lhs_shape=lhs_shape,
        rhs_shape=rhs.shape,
        dtype=lhs.dtype,
        wide_dtype=arguments.result_dtype(lhs.dtype, precision, settings.preferred_element_type),
        window_strides=strides,
        padding=pairs,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=numbers,
        feature_group_count=groups,
        precision=precision,
    )
    arguments.check_crops(pairs, spec.extent("lhs"))
    return Forward(arguments.checked(spec, result), rearrange, extended)


def _feature_groups(
    lhs: Any, rhs: Any, dimension_numbers: Any, feature_groups: int, batch_groups: int
) -> tuple[Any, Callable[[jax.Array], jax.Array]]:
    """Batch groups as feature groups: the type of lhs, and what makes [N, (G C)] of [(G N), C]."""
    if feature_groups > 1:
        raise ValueError(
            f"only one of feature_group_count={feature_groups} and "
            f"batch_group_count={batch_groups} may be more than 1"
        )
    numbers = arguments.layout(lhs.shape, rhs.shape, dimension_numbers)
    (batch, features), (outputs, depth) = numbers.lhs_spec[:2], numbers.rhs_spec[:2]
    if rhs.shape[depth] != lhs.shape[features]:
        raise ValueError(
            f"rhs takes {rhs.shape[depth]} input features, but lhs has {lhs.shape[features]} "
            "features, which batch groups do not divide"
        )
    for size, what in (
        (lhs.shape[batch], "the batch of lhs"),
        (rhs.shape[outputs], "the output features of rhs"),
    ):
        arguments.check_divides("batch_group_count", batch_groups, what, size)
    split = list(lhs.shape)
    split[batch : batch + 1] = batch_groups, split[batch] // batch_groups
    merged = list(lhs.shape)
    merged[batch] //= batch_groups
    merged[features] *= batch_groups

    def rearrange(lhs: jax.Array) -> jax.Array:
        return jnp.moveaxis(jnp.reshape(lhs, split), batch, features).reshape(merged)

    return lhs.update(shape=tuple(merged)), rearrange
