"""ResNeXt, in Flax nnx.

Xie, Girshick, Dollar, Tu and He, "Aggregated Residual Transformations for Deep Neural Networks",
CVPR 2017. A residual block sums many equal narrow paths; form (c) of the paper's figure 3 makes
of them one bottleneck whose 3 x 3 convolution has as many groups as there were paths.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from grouped_conv_jax.operations.conv import grouped_conv

EXPANSION = 4
"""How many times the features of the stem a block of the first stage gives."""

# Flax takes pairs, which its annotation does not say.
POOL_PADDING: Any = ((1, 1), (1, 1))


class ResNeXt(nnx.Module):
    """ResNeXt; by default ResNeXt-50 32x4d, of 25,028,904 parameters.

    As built it trains: batch normalisation goes by the batch, and its running averages follow.
    `net.eval()` makes it go by the averages, `net.train()` back. Where a stage halves the image
    the 3 x 3 convolution has the stride, as in today's published weights.

    Args:
      num_classes: the number of classes.
      stage_sizes: how many blocks each stage has; from one to the next the image halves and the
        features double.
      feature_group_count: the groups of the 3 x 3 convolutions, the paper's cardinality C.
      group_features: features of each group in the first stage, the paper's width d.
      stem_features: of the first convolution.
      conv_general_dilated: the function that convolves, in all layers; to choose an implementation,
        `grouped_conv_jax.layers.Convolution(name)`.
      dtype: of the computation, or None for that of images and parameters; these are float32.
      rngs: keys for the initialisers (stream "params").

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grouped_conv_jax.models import ResNeXt
      >>> net = ResNeXt(10, stage_sizes=(1, 1), rngs=nnx.Rngs(0))
      >>> net(jnp.ones((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        stage_sizes: Sequence[int] = (3, 4, 6, 3),
        feature_group_count: int = 32,
        group_features: int = 4,
        stem_features: int = 64,
        conv_general_dilated: Callable[..., jax.Array] = grouped_conv,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(
            nnx.Conv,
            use_bias=False,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
            conv_general_dilated=conv_general_dilated,
            dtype=dtype,
            rngs=rngs,
        )
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.stem = conv(3, stem_features, (7, 7), 2, padding=3)
        self.stem_norm = norm(stem_features)
        features = stem_features
        blocks = []
        for stage, size in enumerate(stage_sizes):
            for i in range(size):
                block = Block(
                    features,
                    EXPANSION * stem_features << stage,
                    feature_group_count * group_features << stage,
                    strides=2 if stage and not i else 1,
                    feature_group_count=feature_group_count,
                    conv=conv,
                    norm=norm,
                )
                features = EXPANSION * stem_features << stage
                blocks.append(block)
        self.blocks = nnx.List(blocks)
        self.classes = nnx.Linear(features, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Class logits of a batch, (N, num_classes), from images (N, H, W, 3).

        Raises:
          ValueError: the images have another shape.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be (N, H, W, 3), got {images.shape}")
        x = nnx.relu(self.stem_norm(self.stem(images)))
        x = nnx.max_pool(x, (3, 3), (2, 2), POOL_PADDING)
        for block in self.blocks:
            x = block(x)
        return self.classes(jnp.mean(x, axis=(1, 2)))


class Block(nnx.Module):
    """1 x 1 down to `width`, 3 x 3 in groups, 1 x 1 up, and what came in added."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int,
        *,
        strides: int,
        feature_group_count: int,
        conv: Callable[..., nnx.Conv],
        norm: Callable[..., nnx.BatchNorm],
    ):
        self.conv1 = conv(in_features, width, (1, 1))
        self.norm1 = norm(width)
        self.conv2 = conv(
            width, width, (3, 3), strides, padding=1, feature_group_count=feature_group_count
        )
        self.norm2 = norm(width)
        self.conv3 = conv(width, out_features, (1, 1))
        self.norm3 = norm(out_features)
        self.projects = strides > 1 or in_features != out_features
        if self.projects:
            self.projection = conv(in_features, out_features, (1, 1), strides, padding=0)
            self.projection_norm = norm(out_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return nnx.relu(y + (self.projection_norm(self.projection(x)) if self.projects else x))
