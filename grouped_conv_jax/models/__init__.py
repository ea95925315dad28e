"""Networks built on grouped convolution, one file each, and what their devices exchange."""

from grouped_conv_jax.models.alexnet import AlexNet, AlexNetConfig
from grouped_conv_jax.models.alexnet_exchanges import alexnet_exchanges
from grouped_conv_jax.models.convnext import ConvNeXt
from grouped_conv_jax.models.mobilenet import MobileNet
from grouped_conv_jax.models.resnext import ResNeXt

__all__ = ["AlexNet", "AlexNetConfig", "ConvNeXt", "MobileNet", "ResNeXt", "alexnet_exchanges"]
