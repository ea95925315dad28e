"""The two-tower AlexNet, in Flax nnx.

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", NeurIPS 2012. The network is cut lengthwise into towers (the paper's two GPUs) that
exchange what they have computed in few places only: before conv3 and at the fully connected
layers. In between a tower sees itself alone, which is what a grouped convolution is.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from grouped_conv_jax.arguments import check_divides
from grouped_conv_jax.nnx import GroupedConv

POOL_SIZE, POOL_STRIDE = 3, 2
"""Windows of 3 every 2 pixels: overlapping pooling (section 3.4 of the paper)."""


@dataclasses.dataclass(frozen=True)
class ConvLayer:
    """One convolution with its ReLU, then normalisation and pooling where they are set.

    `inputs` says what a tower's filters see: the "image", "all" towers' features, or the "own".
    """

    features: int
    kernel_size: int
    inputs: Literal["image", "all", "own"]
    strides: int = 1
    padding: tuple[int, int] = (0, 0)
    bias: float = 0.0
    normalize: bool = False
    pool: bool = False


@dataclasses.dataclass(frozen=True)
class AlexNetConfig:
    """Everything that makes one net of the family; features and units are of all towers together.

    `paper()` is the net of the article, `small()` one of the same shape for 32-pixel images.
    Convolution and hidden kernels start as N(0, kernel_std²), as in the paper; with `kernel_std`
    None the variance is 2 / inputs of the kernel instead, which suits a narrower net.
    """

    convolutions: tuple[ConvLayer, ...]
    hidden_units: tuple[int, ...]
    num_classes: int
    image_size: int
    image_channels: int = 3
    towers: int = 2
    kernel_std: float | None = 0.01
    hidden_bias: float = 1.0
    dropout_rate: float = 0.5
    lrn_size: int = 5
    lrn_alpha: float = 1e-4
    lrn_beta: float = 0.75
    lrn_k: float = 2.0

    @classmethod
    def paper(cls, *, towers: int = 2, num_classes: int = 1000) -> "AlexNetConfig":
        """The net of 2012: 224-pixel images, 60,965,224 parameters with two towers."""
        return cls(
            convolutions=(
                # Padding (0, 3) gives 55 positions, as the original does by rounding up.
                ConvLayer(96, 11, "image", 4, (0, 3), normalize=True, pool=True),
                ConvLayer(256, 5, "own", padding=(2, 2), bias=1.0, normalize=True, pool=True),
                ConvLayer(384, 3, "all", padding=(1, 1)),
                ConvLayer(384, 3, "own", padding=(1, 1), bias=1.0),
                ConvLayer(256, 3, "own", padding=(1, 1), bias=1.0, pool=True),
            ),
            hidden_units=(4096, 4096),
            num_classes=num_classes,
            image_size=224,
            towers=towers,
        )

    @classmethod
    def small(
        cls, *, towers: int = 2, num_classes: int = 10, image_channels: int = 3
    ) -> "AlexNetConfig":
        """The same net for 32-pixel images, narrow enough to train on a laptop in minutes."""
        return cls(
            convolutions=(
                ConvLayer(32, 5, "image", 1, (2, 2), normalize=True, pool=True),
                ConvLayer(64, 5, "own", padding=(2, 2), normalize=True, pool=True),
                ConvLayer(96, 3, "all", padding=(1, 1)),
                ConvLayer(96, 3, "own", padding=(1, 1)),
                ConvLayer(64, 3, "own", padding=(1, 1), pool=True),
            ),
            hidden_units=(256, 256),
            num_classes=num_classes,
            image_size=32,
            image_channels=image_channels,
            towers=towers,
            kernel_std=None,
            hidden_bias=0.0,
        )

    def check(self) -> None:
        """Raises ValueError where the towers do not divide the features, or the image is too
        small.
        """
        if self.towers < 1:
            raise ValueError(f"towers must be at least 1, got {self.towers}")
        widths = (*(conv.features for conv in self.convolutions), *self.hidden_units)
        names = self.convolution_names + self.dense_names[:-1]
        for layer, width in zip(names, widths, strict=True):
            check_divides("towers", self.towers, f"the features of {layer}", width)
        if self.pooled_size < 1:
            raise ValueError(f"image_size={self.image_size} leaves nothing after the last pooling")

    @property
    def convolution_names(self) -> tuple[str, ...]:
        """conv1, conv2, ..., as the paper numbers the layers."""
        return tuple(f"conv{i}" for i, _ in enumerate(self.convolutions, 1))

    @property
    def dense_names(self) -> tuple[str, ...]:
        """fc6, fc7 and fc8: the hidden layers, and the one that gives the logits."""
        first = len(self.convolutions) + 1
        return tuple(f"fc{first + i}" for i in range(len(self.hidden_units) + 1))

    @property
    def edges(self) -> tuple[int, ...]:
        """Pixels along an edge of what each convolution sees, then the first hidden layer."""
        edges = [self.image_size]
        for conv in self.convolutions:
            size = (edges[-1] + sum(conv.padding) - conv.kernel_size) // conv.strides + 1
            edges.append((size - POOL_SIZE) // POOL_STRIDE + 1 if conv.pool else size)
        return tuple(edges)

    @property
    def pooled_size(self) -> int:
        """Pixels along an edge of what the first fully connected layer sees."""
        return self.edges[-1]


class AlexNet(nnx.Module):
    """AlexNet, whole, or the part of it that one device of several holds.

    Without `axis_size` this is the whole net, to be called anywhere. Inside `shard_map` over a
    mesh axis `axis_name` of D devices, build it with `axis_size=D` (under `nnx.eval_shape`): it
    is then a net of towers / D towers, whose parameters are the slices of the whole net's that
    their `out_sharding` metadata says, and which talks to the other devices over that axis.
    `grouped_conv_jax.towers.TowerNet` does both.

    Args:
      config: the net; see `AlexNetConfig`.
      axis_name: the mesh axis over which the towers are spread; also the name in the metadata.
      axis_size: the number of devices on it, which divides the towers, for the part of the net
        that one of them holds; None for the whole net.
      implementation: of the convolutions, a name from `grouped_conv_jax.implementations()`.
      rngs: keys for the initialisers (stream "params").

    Raises:
      ValueError: the towers do not divide the features, or the devices the towers.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grouped_conv_jax.models import AlexNet, AlexNetConfig
      >>> net = AlexNet(AlexNetConfig.small(), rngs=nnx.Rngs(0))
      >>> net(jnp.ones((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        config: AlexNetConfig,
        *,
        axis_name: str = "group",
        axis_size: int | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        config.check()
        devices = 1 if axis_size is None else axis_size
        if config.towers % devices:
            raise ValueError(
                f"{devices} devices on the axis {axis_name!r} cannot share {config.towers} "
                "towers evenly; take a number of devices that divides the towers"
            )
        self.config = config
        self.axis_name = axis_name
        self.axis_size = axis_size
        self.towers = config.towers // devices

        features = config.image_channels
        convolutions = []
        for conv in config.convolutions:
            own = conv.inputs == "own"
            convolutions.append(
                GroupedConv(
                    features // devices if own else features,
                    conv.features // devices,
                    (conv.kernel_size, conv.kernel_size),
                    conv.strides,
                    padding=[conv.padding, conv.padding],
                    feature_group_count=self.towers if own else 1,
                    implementation=implementation,
                    kernel_init=_kernel_init(config),
                    bias_init=nnx.initializers.constant(conv.bias),
                    kernel_metadata=_sharded(None, None, None, axis_name),
                    bias_metadata=_sharded(axis_name),
                    rngs=rngs,
                )
            )
            features = conv.features
        self.convolutions = nnx.List(convolutions)

        inputs = config.pooled_size**2 * features
        hidden = []
        for units in config.hidden_units:
            hidden.append(
                nnx.Linear(
                    inputs,
                    units // devices,
                    kernel_init=_kernel_init(config),
                    bias_init=nnx.initializers.constant(config.hidden_bias),
                    kernel_metadata=_sharded(None, axis_name),
                    bias_metadata=_sharded(axis_name),
                    rngs=rngs,
                )
            )
            inputs = units
        self.hidden = nnx.List(hidden)
        # Each tower weighs its own units for every class: the kernel is cut along its inputs,
        # and the bias belongs to no tower.
        self.classes = nnx.Linear(
            inputs // devices,
            config.num_classes,
            use_bias=False,
            kernel_init=_kernel_init(config),
            kernel_metadata=_sharded(axis_name, None),
            rngs=rngs,
        )
        self.classes_bias = nnx.Param(jnp.zeros(config.num_classes), **_sharded())
        self.dropout = nnx.Dropout(config.dropout_rate)

    def __call__(self, images: jax.Array, *, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Class logits of a batch.

        Args:
          images: (N, image_size, image_size, image_channels).
          dropout_keys: one key for each example, (N,), when training; None switches dropout off.

        Returns:
          (N, num_classes), the same on all devices of `axis_name`.

        Raises:
          ValueError: the images have another shape.
        """
        config = self.config
        size, channels = config.image_size, config.image_channels
        if images.ndim != 4 or images.shape[1:] != (size, size, channels):
            raise ValueError(f"images must be (N, {size}, {size}, {channels}), got {images.shape}")
        # The scopes name the layers in profiles and in compiled programs (see `placement`).
        x = images
        for name, conv, layer in zip(
            config.convolution_names, config.convolutions, self.convolutions, strict=True
        ):
            with jax.named_scope(name):
                if conv.inputs == "all":
                    x = self.talk(x)
                x = nnx.relu(layer(x))
                if conv.normalize:
                    x = self._normalize(x)
                if conv.pool:
                    x = nnx.max_pool(x, (POOL_SIZE, POOL_SIZE), (POOL_STRIDE, POOL_STRIDE))
        *hidden_names, classes_name = config.dense_names
        for number, (name, layer) in enumerate(zip(hidden_names, self.hidden, strict=True)):
            with jax.named_scope(name):
                x = self.talk(x)
                x = nnx.relu(layer(x.reshape(len(x), -1)))
                x = self._drop(x, dropout_keys, number)
        with jax.named_scope(classes_name):
            return self.talk(self.classes(x), how="sum") + self.classes_bias[None]

    def talk(self, x: jax.Array, how: Literal["gather", "sum"] = "gather") -> jax.Array:
        """Where the towers talk: before conv3 and at every fully connected layer.

        Takes what this device's towers have computed; gives the features of all towers side by
        side ("gather"), or the sum over the devices ("sum", the logits).
        """
        if self.axis_size is None:
            return x
        if how == "sum":
            return lax.psum(x, self.axis_name)
        if self.axis_size == 1:
            return x
        return lax.all_gather(x, self.axis_name, axis=x.ndim - 1, tiled=True)

    def _normalize(self, x: jax.Array) -> jax.Array:
        config = self.config
        x = x.reshape(*x.shape[:-1], self.towers, x.shape[-1] // self.towers)
        y = local_response_normalization(
            x, config.lrn_size, config.lrn_alpha, config.lrn_beta, config.lrn_k
        )
        return y.reshape(*x.shape[:-2], -1)

    def _drop(self, x: jax.Array, keys: jax.Array | None, layer: int) -> jax.Array:
        """Dropout keyed by example, layer and tower, so that it falls out the same wherever an
        example and a tower are computed.
        """
        if keys is None:
            return x
        towers = jnp.arange(self.towers)
        if self.axis_size is not None:
            towers += lax.axis_index(self.axis_name) * self.towers

        def drop(units, key, tower):
            key = jax.random.fold_in(jax.random.fold_in(key, layer), tower)
            return self.dropout(units, rngs=key)

        by_tower = jax.vmap(drop, in_axes=(0, None, 0))
        by_example = jax.vmap(by_tower, in_axes=(0, 0, None))
        return by_example(x.reshape(len(x), self.towers, -1), keys, towers).reshape(x.shape)


def local_response_normalization(
    x: jax.Array, size: int, alpha: float, beta: float, k: float
) -> jax.Array:
    """`x` / (k + alpha * the sum of x² over `size` neighbouring features)^beta (section 3.3).

    Over the last axis, the window centred; what is beyond the ends counts as 0.
    """
    before = size // 2
    total = lax.reduce_window(
        jnp.square(x),
        0.0,
        lax.add,
        window_dimensions=(1,) * (x.ndim - 1) + (size,),
        window_strides=(1,) * x.ndim,
        padding=[(0, 0)] * (x.ndim - 1) + [(before, size - 1 - before)],
    )
    # XLA:CPU makes vectors of these two, and not of a power.
    return x * jnp.exp(-beta * jnp.log(k + alpha * total))


def _kernel_init(config: AlexNetConfig) -> nnx.Initializer:
    if config.kernel_std is None:
        return nnx.initializers.he_normal()
    return nnx.initializers.normal(config.kernel_std)


def _sharded(*axes: str | None) -> dict:
    # `eager_sharding` off: the metadata describes a placement, building the net does not need one.
    return {"out_sharding": axes, "eager_sharding": False}
