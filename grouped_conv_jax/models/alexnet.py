"""The two-tower AlexNet, in Flax nnx.

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", NeurIPS 2012. The network is cut lengthwise into towers (the paper's two GPUs) that
exchange what they have computed in few places only: before conv3 and at the fully connected
layers. In between a tower sees itself alone, which is what a grouped convolution is.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike

from grouped_conv_jax.algorithms.table import Implementation
from grouped_conv_jax.models.alexnet_config import POOL_SIZE, POOL_STRIDE, AlexNetConfig, Step
from grouped_conv_jax.nnx import GroupedConv


class AlexNet(nnx.Module):
    """AlexNet, whole, or the part of it that one device of several holds.

    Without `axis_size` this is the whole net, to be called anywhere. Inside `shard_map` over a
    mesh axis `axis_name` of D devices, build it with `axis_size=D` (under `nnx.eval_shape`): it
    is then a net of towers / D towers, whose parameters are the slices of the whole net's that
    their `out_sharding` metadata says, and which talks to the other devices over that axis.
    `grouped_conv_jax.towers.TowerNet` does both.

    Args:
      config: the net; see `AlexNetConfig`.
      dtype: the type in which the net computes, such as bfloat16 or float16; None for that of
        images and parameters. Parameters and their gradients stay float32, and so do the logits
        and what normalisation is computed of.
      axis_name: the mesh axis over which the towers are spread; also the name in the metadata.
      axis_size: the number of devices on it, which divides the towers, for the part of the net
        that one of them holds; None for the whole net.
      implementation: of the convolutions, a name from `grouped_conv_jax.implementations()`.
      rngs: keys for the initialisers (stream "params").

    Raises:
      ValueError: the towers do not divide the features, or the devices the towers.
      TypeError: `dtype` is no floating-point type of 16 bits or more.

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
        dtype: DTypeLike | None = None,
        axis_name: str = "group",
        axis_size: int | None = None,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        config.check()
        _check_dtype(dtype)
        devices = 1 if axis_size is None else axis_size
        if config.towers % devices:
            raise ValueError(
                f"{devices} devices on the axis {axis_name!r} cannot share {config.towers} "
                "towers evenly; take a number of devices that divides the towers"
            )
        self.config = config
        self.dtype = dtype
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
                    kernel_init=_kernel_init(config, conv.kernel_std),
                    bias_init=nnx.initializers.constant(conv.bias),
                    dtype=dtype,
                    promote_dtype=_promote,
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
                    kernel_init=_kernel_init(config, config.hidden_std),
                    bias_init=nnx.initializers.constant(config.hidden_bias),
                    dtype=dtype,
                    promote_dtype=_promote,
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
            dtype=dtype,
            promote_dtype=_promote,
            # The logits, and their sum over the devices, have more bits than what is weighed.
            preferred_element_type=None if dtype is None else _at_least_float32(dtype),
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
                x = layer(x)
                for step in conv.steps:
                    x = self._follow(x, step)
        *hidden_names, classes_name = config.dense_names
        for number, (name, layer) in enumerate(zip(hidden_names, self.hidden, strict=True)):
            with jax.named_scope(name):
                if config.dropout_on == "inputs":
                    x = self._drop(x, dropout_keys, number)
                x = self.talk(x)
                x = nnx.relu(layer(x.reshape(x.shape[0], -1)))
                if config.dropout_on == "outputs":
                    x = self._drop(x, dropout_keys, number)
        with jax.named_scope(classes_name):
            return self.talk(self.classes(x), how="sum") + self.classes_bias[None]

    def talk(self, x: jax.Array, how: Literal["gather", "sum"] = "gather") -> jax.Array:
        """Where the towers talk: before conv3 and at every fully connected layer, and where they
        are normalised together (`lrn_across_towers`).

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

    def _follow(self, x: jax.Array, step: Step) -> jax.Array:
        config = self.config
        match step:
            case "relu":
                return nnx.relu(x)
            case "pool":
                return nnx.max_pool(x, (POOL_SIZE, POOL_SIZE), (POOL_STRIDE, POOL_STRIDE))
            case "lrn":
                return self._normalize(x)
            case "spatial lrn":
                alpha, k = config.spatial_lrn_alpha, config.spatial_lrn_k
                window = (1, config.lrn_size, config.lrn_size, 1)
                return _normalize_by_neighbours(x, window, alpha, config.lrn_beta, k)

    def _normalize(self, x: jax.Array) -> jax.Array:
        """Over neighbouring features, those of each tower or, across towers, those of all."""
        config = self.config
        towers, own = self.towers, x.shape[-1]
        if config.lrn_across_towers:
            towers, x = 1, self.talk(x)
        features = x.shape[-1]
        x = x.reshape(*x.shape[:-1], towers, features // towers)
        x = local_response_normalization(
            x, config.lrn_size, config.lrn_alpha, config.lrn_beta, config.lrn_k
        )
        x = x.reshape(*x.shape[:-2], features)
        if own == features:
            return x
        start = lax.axis_index(self.axis_name) * own
        return lax.dynamic_slice_in_dim(x, start, own, axis=x.ndim - 1)

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

        by_tower = jax.vmap(drop, in_axes=(1, None, 0), out_axes=1)
        by_example = jax.vmap(by_tower, in_axes=(0, 0, None))
        pixels = math.prod(x.shape[1:-1])
        units = x.reshape(len(x), pixels, self.towers, x.shape[-1] // self.towers)
        return by_example(units, keys, towers).reshape(x.shape)


def local_response_normalization(
    x: jax.Array, size: int, alpha: float, beta: float, k: float
) -> jax.Array:
    """`x` / (k + alpha * the sum of x² over `size` neighbouring features)^beta (section 3.3).

    Over the last axis, the window centred; what is beyond the ends counts as 0.
    """
    return _normalize_by_neighbours(x, (1,) * (x.ndim - 1) + (size,), alpha, beta, k)


def _normalize_by_neighbours(
    x: jax.Array, window: Sequence[int], alpha: float, beta: float, k: float
) -> jax.Array:
    # A square is beyond float16 from 256 on, and bfloat16 has too few digits for a sum.
    wide = x.astype(_at_least_float32(x.dtype))
    total = lax.reduce_window(
        jnp.square(wide),
        0.0,
        lax.add,
        window_dimensions=window,
        window_strides=(1,) * x.ndim,
        padding=[(size // 2, size - 1 - size // 2) for size in window],
    )
    # XLA:CPU makes vectors of these two, and not of a power.
    return (wide * jnp.exp(-beta * jnp.log(k + alpha * total))).astype(x.dtype)


def _at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype)


def _check_dtype(dtype: DTypeLike | None) -> None:
    """Raises TypeError for a type that the net does not compute in."""
    if dtype is None:
        return
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 2:
        raise TypeError(
            f"dtype must be a floating-point type of 16 bits or more, such as bfloat16, got "
            f"{jnp.dtype(dtype).name}"
        )


def _promote(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Flax's promotion of (inputs, kernel, bias), the parameters having been spread first.

    Under `shard_map` a parameter that meets examples spread over devices is spread over them too,
    and its gradient is summed over them where that happens. Here it happens before the cast, so
    that the sum is one of float32.
    """
    inputs, *params = arrays
    varying = jax.typeof(inputs).manual_axis_type.varying

    def spread(param: jax.Array | None) -> jax.Array | None:
        if param is None:
            return None
        missing = tuple(sorted(varying - jax.typeof(param).manual_axis_type.varying))
        return lax.pcast(param, missing, to="varying")

    return promote_dtype((inputs, *map(spread, params)), dtype=dtype, inexact=inexact)


def _kernel_init(config: AlexNetConfig, std: float | None = None) -> nnx.Initializer:
    std = config.kernel_std if std is None else std
    return nnx.initializers.he_normal() if std is None else nnx.initializers.normal(std)


def _sharded(*axes: str | None) -> dict:
    # `eager_sharding` off: the metadata describes a placement, building the net does not need one.
    return {"out_sharding": axes, "eager_sharding": False}
