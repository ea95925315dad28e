"""Networks built on grouped convolution, one file each, and what their devices exchange."""

from grouped_conv_jax.models.alexnet import AlexNet, AlexNetConfig
from grouped_conv_jax.models.alexnet_exchanges import alexnet_exchanges

__all__ = ["AlexNet", "AlexNetConfig", "alexnet_exchanges"]
