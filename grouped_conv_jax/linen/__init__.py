"""Layers for Flax linen, channels last, on the operations of this library."""

from grouped_conv_jax.linen.causal_conv import CausalConv
from grouped_conv_jax.linen.depthwise_conv import DepthwiseConv
from grouped_conv_jax.linen.grouped_conv import GroupedConv
from grouped_conv_jax.linen.grouped_conv_local import GroupedConvLocal
from grouped_conv_jax.linen.grouped_conv_transpose import GroupedConvTranspose
from grouped_conv_jax.linen.separable_conv import SeparableConv

__all__ = [
    "CausalConv",
    "DepthwiseConv",
    "GroupedConv",
    "GroupedConvLocal",
    "GroupedConvTranspose",
    "SeparableConv",
]
