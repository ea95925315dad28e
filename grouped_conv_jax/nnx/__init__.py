"""Layers for Flax nnx, channels last, on the operations of this library."""

from grouped_conv_jax.nnx.causal_conv import CausalConv
from grouped_conv_jax.nnx.depthwise_conv import DepthwiseConv
from grouped_conv_jax.nnx.grouped_conv import GroupedConv
from grouped_conv_jax.nnx.grouped_conv_local import GroupedConvLocal
from grouped_conv_jax.nnx.grouped_conv_transpose import GroupedConvTranspose
from grouped_conv_jax.nnx.separable_conv import SeparableConv

__all__ = [
    "CausalConv",
    "DepthwiseConv",
    "GroupedConv",
    "GroupedConvLocal",
    "GroupedConvTranspose",
    "SeparableConv",
]
