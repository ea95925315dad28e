"""Towers on devices: the mesh, where each parameter lives, and programs written per device.

A net made of towers (see `models`) says in the metadata of its parameters which of their
dimensions the towers cut. From that follow the PartitionSpecs of the whole net's parameters, and
the net that one device holds. What is computed of each example is written once, as a function of a
net, and runs in each way that JAX has of using several devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import jax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grouped_conv_jax.operations import arguments
from grouped_conv_jax.parallel.pmap import Pmap
from grouped_conv_jax.text import shown

DATA, GROUP = "data", "group"
"""The mesh axes: examples are spread over the one, towers over the other."""

Placement = Literal["jit", "shard_map", "pmap"]
"""How a net comes to its devices: see `TowerNet.by_example`."""

PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


def make_mesh(data: int, group: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `group` devices with axes ("data", "group"): the first that there are.

    Raises:
      ValueError: there are fewer devices, or the first ones of a TPU form no such mesh.
      TypeError: an argument is no integer, or `devices` are none.
    """
    data, group = (
        arguments.integer(name, size, "an integer")
        for name, size in (("data", data), ("group", group))
    )
    given = jax.devices() if devices is None else devices
    devices = list(given) if isinstance(given, Iterable) else [given]
    if not all(hasattr(device, "device_kind") for device in devices):
        raise TypeError(f"devices must be a sequence such as jax.devices(), got {shown(given)}")
    if data < 1 or group < 1:
        raise ValueError(f"a mesh has at least one device on each axis, got {data} x {group}")
    if data * group > len(devices):
        hint = "; a CPU can be several, if jax_num_cpu_devices is set before the first use of JAX"
        raise ValueError(
            f"a mesh of {data} x {group} needs {data * group} devices, there are {len(devices)}"
            + hint * any(d.platform == "cpu" for d in devices[:1])
        )
    try:
        return jax.make_mesh(
            (data, group), (DATA, GROUP), (AxisType.Auto,) * 2, devices=devices[: data * group]
        )
    except AssertionError as error:  # Of JAX, which looks for boxes of a TPU's chips.
        raise ValueError(
            f"the first {data * group} of {len(devices)} devices form no mesh of {data} x {group}; "
            "use all of them, or as many as form a box of chips"
        ) from error


@dataclasses.dataclass(frozen=True)
class TowerNet:
    """A net whose towers are spread over the `group` axis of a mesh.

    Attributes:
      build: makes the net, from the number of devices that share its towers (None for the whole
        net, that no devices share) and the keys of the initialisers.
      mesh: the devices; see `make_mesh`.

    Raises:
      ValueError: the mesh lacks an axis, or the net cannot be cut into as many parts as the axis
        `group` has devices.

    Example:
      The logits of a batch, each device computing its examples and its towers:

      >>> import jax, jax.numpy as jnp
      >>> from grouped_conv_jax.models import AlexNet, AlexNetConfig
      >>> from grouped_conv_jax.towers import TowerNet, make_mesh
      >>> config = AlexNetConfig.small()
      >>> net = TowerNet(
      ...     lambda axis_size, rngs: AlexNet(config, axis_size=axis_size, rngs=rngs),
      ...     make_mesh(data=1, group=1),  # group=2 for a device each
      ... )
      >>> params = net.init(jax.random.key(0))
      >>> logits = net.by_example(lambda net, images: net(images), "shard_map")
      >>> jax.jit(logits)(params, jnp.ones((4, 32, 32, 3))).shape
      (4, 10)
    """

    build: Callable[[int | None, nnx.Rngs], nnx.Module]
    mesh: Mesh

    def __post_init__(self):
        for axis in (DATA, GROUP):
            if axis not in self.mesh.axis_names:
                raise ValueError(
                    f"the mesh has no axis {axis!r}; its axes are {self.mesh.axis_names}"
                )
            if self.mesh.axis_types[self.mesh.axis_names.index(axis)] != AxisType.Auto:
                raise ValueError(
                    f"the mesh axis {axis!r} must be Auto, as those of make_mesh are, not "
                    f"{self.mesh.axis_types[self.mesh.axis_names.index(axis)].name}"
                )
        self._check_metadata()

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
        return nnx.to_pure_dict(nnx.get_partition_spec(self._whole_net[1]))

    @property
    def shardings(self) -> Any:
        """`specs` on the mesh."""
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec),
            self.specs,
            is_leaf=_is_spec,
        )

    def whole(self, params: Any) -> Any:
        """The net of all towers, of global arrays, which no device needs to hold whole."""
        return nnx.merge(self._whole_net[0], params)

    def on_device(self, params: Any) -> Any:
        """Inside `shard_map` or `pmap`: the net of this device's towers, from its parameters."""
        return nnx.merge(self._net_of_a_device[0], params)

    def by_example(self, function: Callable, placement: Placement = "shard_map") -> Callable:
        """`function` as one of global arrays, computed by all devices.

        The values and where the arrays live do not depend on the placement.

        Args:
          function: `function(net, *arrays)`, from a net and arrays that have the examples as their
            leading dimension to such arrays, what belongs to an example depending on no other one.
          placement: how the devices are used.
            "jit": the whole net on global arrays, which XLA partitions. To be called inside
            `jax.jit`; can be differentiated.
            "shard_map": the program of one device, on its examples and its towers. To be called
            inside `jax.jit`; can be differentiated.
            "pmap": the same program under `jax.pmap`. To be called outside of `jax.jit`;
            gradients are taken by the program itself (see `sum_gradients`).

        Returns:
          `by_example(params, *arrays)`. It raises ValueError for a batch that the axis `data` does
          not divide.

        Raises:
          ValueError: there is no such placement.
        """
        if placement not in PLACEMENTS:
            known = ", ".join(PLACEMENTS)
            raise ValueError(f"unknown placement {placement!r}; known: {known}")

        def on_device(params, *arrays):
            return function(self.on_device(params), *arrays)

        @functools.cache
        def placed(count: int) -> Callable:
            examples = PartitionSpec(DATA)
            in_specs = (self.specs, *[examples] * count)
            if placement == "pmap":
                return Pmap(on_device, self.mesh, in_specs, examples)
            return jax.shard_map(on_device, mesh=self.mesh, in_specs=in_specs, out_specs=examples)

        def by_example(params, *arrays):
            for array in arrays:
                self.check_batch(len(array))
            if placement == "jit":
                arrays = lax.with_sharding_constraint(arrays, self.examples)
                params = lax.with_sharding_constraint(params, self.shardings)
                results = function(self.whole(params), *arrays)
                return lax.with_sharding_constraint(results, self.examples)
            return placed(len(arrays))(params, *arrays)

        return by_example

    def sum_gradients(self, grads: Any) -> Any:
        """Inside `pmap`: the gradients of the sum over all devices of what each differentiated.

        A device's own gradients take account of what it sends to others within the net, but not of
        the copies of a parameter: they are summed over the mesh axes that its spec does not name.
        """

        def summed(grad: jax.Array, sharding: NamedSharding) -> jax.Array:
            named = _axes(sharding.spec)
            return lax.psum(grad, tuple(a for a in self.mesh.axis_names if a not in named))

        return jax.tree.map(summed, grads, self.shardings)

    @property
    def examples(self) -> NamedSharding:
        """The sharding of arrays that have the examples as their leading dimension."""
        return NamedSharding(self.mesh, PartitionSpec(DATA))

    def check_batch(self, size: int) -> None:
        """Raises ValueError for a batch that does not divide over the devices."""
        if size % self.mesh.shape[DATA]:
            raise ValueError(
                f"a batch of {size} examples does not divide over the {self.mesh.shape[DATA]} "
                f"devices of the mesh axis {DATA!r}"
            )

    @functools.cached_property
    def _whole_net(self) -> tuple[nnx.GraphDef, Any]:
        return _graphdef_and_params(lambda: self.build(None, nnx.Rngs(0)))

    @functools.cached_property
    def _net_of_a_device(self) -> tuple[nnx.GraphDef, Any]:
        return _graphdef_and_params(lambda: self.build(self.mesh.shape[GROUP], nnx.Rngs(0)))

    def _check_metadata(self) -> None:
        """Raises ValueError unless the devices' parts of each parameter make up the whole."""
        for path, spec in jax.tree.leaves_with_path(self.specs, is_leaf=_is_spec):
            for axis in _axes(spec):
                if axis not in self.mesh.axis_names:
                    raise ValueError(
                        f"{jax.tree_util.keystr(path)} is on the axis {axis!r} by its metadata; "
                        f"the mesh's axes are {self.mesh.axis_names}"
                    )
        parts = jax.tree.leaves(nnx.to_pure_dict(self._net_of_a_device[1]))
        whole = jax.tree.leaves_with_path(nnx.to_pure_dict(self._whole_net[1]))
        for (path, array), part, sharding in zip(
            whole, parts, jax.tree.leaves(self.shardings), strict=True
        ):
            expected = sharding.shard_shape(array.shape)
            if part.shape != expected:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} is {part.shape} in the net of one device, but "
                    f"{sharding.spec} gives it {expected} of {array.shape}"
                )


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _axes(spec: PartitionSpec) -> set[str]:
    """The mesh axes that a PartitionSpec names."""
    entries = ((entry,) if isinstance(entry, str) else entry or () for entry in spec)
    return {axis for entry in entries for axis in entry}


def _graphdef_and_params(build: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Any]:
    graphdef, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise NotImplementedError("nets with state other than parameters")
    return graphdef, params
