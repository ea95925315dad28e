"""ConvNeXt, in Flax nnx.

Liu, Mao, Wu, Feichtenhofer, Darrell and Xie, "A ConvNet for the 2020s", CVPR 2022. A residual
block is a 7 x 7 depthwise convolution, with a group for each feature, and two linear layers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from grouped_conv_jax.operations.conv import grouped_conv

STEM_SIZE = 4
"""The first convolution makes one position of so many pixels along an edge."""


class ConvNeXt(nnx.Module):
    """ConvNeXt; by default ConvNeXt-T, of 28,589,128 parameters.

    As built it trains: blocks are skipped at random. `net.eval()` keeps all, `net.train()` skips
    again.

    Args:
      num_classes: the number of classes.
      stage_sizes: how many blocks each stage has; from one to the next the image halves.
      features: of each stage.
      stochastic_depth_rate: how often an example skips the last block in training; the first one
        is never skipped, those in between as often as is in between.
      layer_scale: what each block begins to be multiplied by.
      conv_general_dilated: the function that convolves, in all layers; to choose an implementation,
        `grouped_conv_jax.layers.Convolution(name)`.
      dtype: of the computation, or None for that of images and parameters; these are float32.
      rngs: keys for the initialisers (stream "params") and for what is skipped (stream "dropout").

    Raises:
      ValueError: `stage_sizes` and `features` differ in length.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grouped_conv_jax.models import ConvNeXt
      >>> net = ConvNeXt(10, stage_sizes=(1, 1), features=(16, 32), rngs=nnx.Rngs(0))
      >>> net(jnp.ones((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        stage_sizes: Sequence[int] = (3, 3, 9, 3),
        features: Sequence[int] = (96, 192, 384, 768),
        stochastic_depth_rate: float = 0.1,
        layer_scale: float = 1e-6,
        conv_general_dilated: Callable[..., jax.Array] = grouped_conv,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        if len(stage_sizes) != len(features):
            raise ValueError(
                f"stage_sizes has {len(stage_sizes)} stages, features has {len(features)}"
            )
        weights = {"kernel_init": nnx.initializers.truncated_normal(0.02), "dtype": dtype}
        conv = functools.partial(
            nnx.Conv, conv_general_dilated=conv_general_dilated, rngs=rngs, **weights
        )
        linear = functools.partial(nnx.Linear, rngs=rngs, **weights)
        norm = functools.partial(nnx.LayerNorm, epsilon=1e-6, dtype=dtype, rngs=rngs)

        self.stem = conv(3, features[0], (STEM_SIZE, STEM_SIZE), STEM_SIZE, padding=0)
        self.stem_norm = norm(features[0])
        self.smallest = STEM_SIZE << (len(features) - 1)
        last = max(sum(stage_sizes) - 1, 1)
        before, inputs = 0, features[0]
        stages = []
        for size, width in zip(stage_sizes, features, strict=True):
            downsampling = []
            if stages:
                downsampling = [norm(inputs), conv(inputs, width, (2, 2), 2, padding=0)]
            rates = [stochastic_depth_rate * i / last for i in range(before, before + size)]
            blocks = [
                Block(
                    width,
                    layer_scale,
                    nnx.Dropout(rate, broadcast_dims=(1, 2, 3), rngs=rngs),
                    conv=conv,
                    norm=norm,
                    linear=linear,
                )
                for rate in rates
            ]
            stages.append(nnx.Sequential(*downsampling, *blocks))
            before, inputs = before + size, width
        self.stages = nnx.List(stages)
        self.norm = norm(inputs)
        self.classes = linear(inputs, num_classes)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Class logits of a batch, (N, num_classes), from images (N, H, W, 3).

        Raises:
          ValueError: the images have another shape, or are too small to be halved so often.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < self.smallest:
            raise ValueError(
                f"images must be (N, H, W, 3), H and W at least {self.smallest}, got {images.shape}"
            )
        x = self.stem_norm(self.stem(images))
        for stage in self.stages:
            x = stage(x)
        return self.classes(self.norm(jnp.mean(x, axis=(1, 2))))


class Block(nnx.Module):
    """7 x 7 depthwise, a linear layer to four times the features, one back; what came in added.

    What is added to it is multiplied by a scale for each feature, and goes through `skip`, which
    leaves it out for some examples.
    """

    def __init__(
        self,
        features: int,
        layer_scale: float,
        skip: nnx.Dropout,
        *,
        conv: Callable[..., nnx.Conv],
        norm: Callable[..., nnx.LayerNorm],
        linear: Callable[..., nnx.Linear],
    ):
        self.conv = conv(features, features, (7, 7), padding=3, feature_group_count=features)
        self.norm = norm(features)
        self.expand = linear(features, 4 * features)
        self.project = linear(4 * features, features)
        self.scale = nnx.Param(jnp.full((features,), layer_scale))
        self.skip = skip

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.gelu(self.expand(self.norm(self.conv(x))), approximate=False)
        y = self.project(y)
        scale = self.scale[...].astype(y.dtype)
        return x + self.skip(y * jnp.broadcast_to(scale, y.shape))
