"""Networks built on grouped convolution, one file each."""

from grouped_conv_jax.models.alexnet import AlexNet, AlexNetConfig

__all__ = ["AlexNet", "AlexNetConfig"]
