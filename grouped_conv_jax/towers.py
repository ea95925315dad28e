"""Towers on devices: the mesh, where each parameter lives, and programs written per device.

A net made of towers (see `models`) says in the metadata of its parameters which of their
dimensions the towers cut. From that follow the PartitionSpecs of the whole net's parameters, and
the net that one device holds, to be called inside `jax.shard_map`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, GROUP = "data", "group"
"""The mesh axes: examples are spread over the one, towers over the other."""


def make_mesh(data: int, group: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `group` devices with axes ("data", "group"): the first that there are.

    Raises:
      ValueError: there are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    if data < 1 or group < 1:
        raise ValueError(f"a mesh has at least one device on each axis, got {data} x {group}")
    if data * group > len(devices):
        raise ValueError(
            f"a mesh of {data} x {group} needs {data * group} devices, there are {len(devices)}; "
            "a CPU can be several, if jax_num_cpu_devices is set before the first use of JAX"
        )
    return jax.make_mesh(
        (data, group), (DATA, GROUP), (AxisType.Auto,) * 2, devices=devices[: data * group]
    )


@dataclasses.dataclass(frozen=True)
class TowerNet:
    """A net whose towers are spread over the `group` axis of a mesh.

    Attributes:
      build: makes the net, from the number of devices that share its towers (None for the whole
        net, that no devices share) and the keys of the initialisers.
      mesh: the devices; see `make_mesh`.

    Example:
      The logits of a batch, each device computing its examples and its towers:

      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec
      >>> from grouped_conv_jax.models import AlexNet, AlexNetConfig
      >>> from grouped_conv_jax.towers import TowerNet, make_mesh
      >>> config = AlexNetConfig.small()
      >>> net = TowerNet(
      ...     lambda axis_size, rngs: AlexNet(config, axis_size=axis_size, rngs=rngs),
      ...     make_mesh(data=1, group=1),  # group=2 for a device each
      ... )
      >>> params = net.init(jax.random.key(0))
      >>> examples = PartitionSpec("data")
      >>> apply = jax.shard_map(
      ...     lambda params, images: net.on_device(params)(images),
      ...     mesh=net.mesh, in_specs=(net.specs, examples), out_specs=examples,
      ... )
      >>> jax.jit(apply)(params, jnp.ones((4, 32, 32, 3))).shape
      (4, 10)
    """

    build: Callable[[int | None, nnx.Rngs], nnx.Module]
    mesh: Mesh

    def init(self, key: jax.Array) -> Any:
        """Parameters of the whole net (nested dicts), each device getting its towers' only.

        They are the same numbers on every mesh.
        """

        def whole(key):
            return nnx.to_pure_dict(nnx.state(self.build(None, nnx.Rngs(key)), nnx.Param))

        return jax.jit(whole, out_shardings=self.shardings)(key)

    @functools.cached_property
    def specs(self) -> Any:
        """The PartitionSpec of each parameter, from the metadata of the net."""
        net = nnx.eval_shape(lambda: self.build(None, nnx.Rngs(0)))
        return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(net, nnx.Param)))

    @property
    def shardings(self) -> Any:
        """`specs` on the mesh."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec),
            self.specs,
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )

    def on_device(self, params: Any) -> Any:
        """Inside `shard_map`: the net of this device's towers, from this device's parameters."""
        axis_size = self.mesh.shape[GROUP]
        net = nnx.eval_shape(lambda: self.build(axis_size, nnx.Rngs(0)))
        graphdef, _, rest = nnx.split(net, nnx.Param, ...)
        if jax.tree.leaves(rest):
            raise NotImplementedError("nets with state other than parameters")
        return nnx.merge(graphdef, params)
