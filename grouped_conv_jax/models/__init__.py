"""Networks built on grouped convolution, one file each, and what their devices exchange."""

from grouped_conv_jax.models.alexnet import AlexNet
from grouped_conv_jax.models.alexnet_config import ALEXNETS, AlexNetConfig, ConvLayer
from grouped_conv_jax.models.alexnet_exchanges import alexnet_exchanges
from grouped_conv_jax.models.convnext import ConvNeXt
from grouped_conv_jax.models.mobilenet import MobileNet
from grouped_conv_jax.models.resnext import ResNeXt

__all__ = [
    "ALEXNETS",
    "AlexNet",
    "AlexNetConfig",
    "ConvLayer",
    "ConvNeXt",
    "MobileNet",
    "ResNeXt",
    "alexnet_exchanges",
]
