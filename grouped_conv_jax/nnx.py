"""Layers for Flax nnx: Flax's own, with the op injected."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from grouped_conv_jax.layers import Convolution, check_features, check_no_other_convolution


class GroupedConv(nnx.Conv):
    """`flax.nnx.Conv` in groups, on `grouped_conv`.

    Inputs are channels-last, (*batch, *spatial, in_features); the kernel is
    (*kernel_size, in_features // feature_group_count, out_features).

    Args:
      in_features: features of the input.
      out_features: features of the output.
      kernel_size: an integer (one spatial dimension) or a sequence of integers.
      strides: an integer or a sequence of integers.
      feature_group_count: the number of groups; divides both features.
      implementation: a name from `grouped_conv_jax.implementations()`, or None to choose.
      rngs: keys for the initialisers.
      **kwargs: everything else that `flax.nnx.Conv` takes: padding (the modes of Flax too),
        input_dilation, kernel_dilation, use_bias, mask, dtype, param_dtype, precision,
        kernel_init, bias_init, promote_dtype, preferred_element_type, kernel_metadata and
        bias_metadata.

    Raises:
      ValueError, TypeError: the groups do not divide the features.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grouped_conv_jax.nnx import GroupedConv
      >>> layer = GroupedConv(8, 12, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
      >>> layer.kernel.shape
      (3, 3, 2, 12)
      >>> layer(jnp.ones((1, 5, 5, 8))).shape
      (1, 5, 5, 12)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        feature_group_count: int,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        check_no_other_convolution(conv_general_dilated=kwargs.pop("conv_general_dilated", None))
        check_features(in_features, out_features, feature_group_count)
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            feature_group_count=feature_group_count,
            conv_general_dilated=Convolution(implementation),
            rngs=rngs,
            **kwargs,
        )
