"""What AlexNet's devices have to exchange, from the figures of its layers alone.

Independent of any program: `placement_report` compares a compiled one with it.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from grouped_conv_jax.models.alexnet_config import AlexNetConfig
from grouped_conv_jax.parallel.placement import Exchange
from grouped_conv_jax.parallel.towers import DATA, GROUP


def alexnet_exchanges(
    config: AlexNetConfig,
    examples: int,
    mesh_shape: Mapping[Any, int],
    *,
    dtype: DTypeLike | None = None,
    itemsize: int = 4,
) -> tuple[Exchange, ...]:
    """What devices must exchange in one training step, if each holds whole towers.

    Where the towers talk, a device gathers what they have all computed, and the sum over towers of
    its gradient is scattered back; the logits are a sum over towers, and each kernel's gradient one
    over the examples. Nothing else has to move.

    Args:
      config: the net.
      examples: on each device.
      mesh_shape: `mesh.shape`, the devices on the axes "data" (examples) and "group" (towers).
      dtype: in which the net computes (see `AlexNet`), and what the towers' features travel in;
        None for that of the parameters.
      itemsize: bytes of a number of the parameters, their gradients and the logits.

    Example:
      The paper's two towers, a training batch of 128: the logits' sum.

      >>> from grouped_conv_jax.models import AlexNetConfig, alexnet_exchanges
      >>> alexnet_exchanges(AlexNetConfig.paper(), 128, {"data": 1, "group": 2})[-1]
      Exchange(layer='fc8', contraction='fprop', kind='all-reduce', axes=('group',), nbytes=512000)
    """
    data, group = mesh_shape.get(DATA, 1), mesh_shape.get(GROUP, 1)
    travelling = itemsize if dtype is None else jnp.dtype(dtype).itemsize
    found = []
    if group > 1:
        for name, numbers in _talks(config):
            nbytes = examples * numbers * travelling
            found += [
                Exchange(name, "fprop", "all-gather", (GROUP,), nbytes),
                Exchange(name, "dgrad", "reduce-scatter", (GROUP,), nbytes),
            ]
        nbytes = examples * config.num_classes * itemsize
        found.append(Exchange(config.dense_names[-1], "fprop", "all-reduce", (GROUP,), nbytes))
    if data > 1:
        found += [
            Exchange(name, "wgrad", "all-reduce", (DATA,), numbers * itemsize)
            for name, numbers in _held(config, group)
        ]
    order = config.convolution_names + config.dense_names
    return tuple(sorted(found, key=lambda exchange: order.index(exchange.layer)))


def _talks(config: AlexNetConfig) -> list[tuple[str, int]]:
    """The layers that see all towers, and how many numbers of one example they see."""
    seen, channels = [], config.image_channels
    for i, (name, conv) in enumerate(
        zip(config.convolution_names, config.convolutions, strict=True)
    ):
        if conv.inputs == "all":
            seen.append((name, config.edges[i] ** 2 * channels))
        channels = conv.features
        if conv.normalize and config.lrn_across_towers:
            pooled = "pool" in conv.steps[: conv.steps.index("lrn")]
            edge = config.edges[i + 1] if pooled else conv.positions(config.edges[i])
            seen.append((name, edge**2 * channels))
    units = (config.pooled_size**2 * channels, *config.hidden_units[:-1])
    return seen + list(zip(config.dense_names[:-1], units, strict=True))


def _held(config: AlexNetConfig, devices: int) -> list[tuple[str, int]]:
    """How many parameters of each layer a device holds, if so many share the towers."""
    held, channels = [], config.image_channels
    for name, conv in zip(config.convolution_names, config.convolutions, strict=True):
        inputs = channels // config.towers if conv.inputs == "own" else channels
        held.append((name, (conv.kernel_size**2 * inputs + 1) * conv.features // devices))
        channels = conv.features
    inputs = config.pooled_size**2 * channels
    for name, units in zip(config.dense_names[:-1], config.hidden_units, strict=True):
        held.append((name, (inputs + 1) * units // devices))
        inputs = units
    # The kernel of the last layer is cut along its inputs; its bias belongs to no tower.
    logits = config.num_classes
    return [*held, (config.dense_names[-1], inputs * logits // devices + logits)]
