"""MobileNet, the first version, in Flax nnx.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
Applications", arXiv:1704.04861, 2017. A depthwise convolution, with a group for each feature,
looks around; the 1 x 1 convolution after it mixes the features.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from grouped_conv_jax.operations.conv import grouped_conv

STEM_FEATURES = 32

BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)
"""Features that each pair of convolutions gives, and the strides of the depthwise one (table 1)."""


class MobileNet(nnx.Module):
    """MobileNet v1; by default 1.0 MobileNet-224, of 4,231,976 parameters.

    A chain: every convolution is followed by batch normalisation and ReLU6 (as in the authors'
    code; the paper says ReLU), and is padded by one pixel on each side if it is 3 x 3. As built the
    net trains: batch normalisation goes by the batch, and its running averages follow. `net.eval()`
    makes it go by the averages, `net.train()` back.

    Args:
      num_classes: the number of classes.
      blocks: features and strides of each depthwise convolution and the 1 x 1 one after it.
      width_multiplier: all features are so many times as many, the paper's alpha.
      conv_general_dilated: the function that convolves, in all layers; to choose an implementation,
        `grouped_conv_jax.layers.Convolution(name)`.
      dtype: of the computation, or None for that of images and parameters; these are float32.
      rngs: keys for the initialisers (stream "params").

    Raises:
      ValueError: `width_multiplier` leaves a convolution without features.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grouped_conv_jax.models import MobileNet
      >>> net = MobileNet(10, blocks=((64, 1), (128, 2)), width_multiplier=0.25, rngs=nnx.Rngs(0))
      >>> net(jnp.ones((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        blocks: Sequence[tuple[int, int]] = BLOCKS,
        width_multiplier: float = 1.0,
        conv_general_dilated: Callable[..., jax.Array] = grouped_conv,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(
            nnx.Conv,
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            conv_general_dilated=conv_general_dilated,
            dtype=dtype,
            rngs=rngs,
        )
        fewest = min(STEM_FEATURES, *(features for features, _ in blocks))
        if width_multiplier * fewest < 1:
            raise ValueError(
                f"width_multiplier={width_multiplier} leaves nothing of {fewest} features; "
                f"at least 1/{fewest}"
            )
        inputs = int(width_multiplier * STEM_FEATURES)
        convolutions = [conv(3, inputs, (3, 3), 2, padding=1)]
        for full_features, strides in blocks:
            features = int(width_multiplier * full_features)
            convolutions += [
                conv(inputs, inputs, (3, 3), strides, padding=1, feature_group_count=inputs),
                conv(inputs, features, (1, 1)),
            ]
            inputs = features
        self.convolutions = nnx.List(convolutions)
        self.norms = nnx.List(
            nnx.BatchNorm(layer.out_features, momentum=0.99, epsilon=1e-3, dtype=dtype, rngs=rngs)
            for layer in convolutions
        )
        self.classes = nnx.Linear(inputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Class logits of a batch, (N, num_classes), from images (N, H, W, 3).

        Raises:
          ValueError: the images have another shape.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be (N, H, W, 3), got {images.shape}")
        x = images
        for layer, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu6(norm(layer(x)))
        return self.classes(jnp.mean(x, axis=(1, 2)))
