"""The contractions in a function, as one device computes them, and how often.

Tracing tells them, but where several devices share the work and only shardings say how: those are
decided when the function is compiled, so there it is. It is not run.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, Sharding

from grouped_conv_jax.algorithms.devices import Device, check_one_platform
from grouped_conv_jax.algorithms.ranking import Choices
from grouped_conv_jax.algorithms.recording import Equation, Watch, watching
from grouped_conv_jax.algorithms.table import asked_for
from grouped_conv_jax.jax_compat import jaxprs_in_params
from grouped_conv_jax.primitive import grouped_conv_p
from grouped_conv_jax.spec import Contraction, ConvSpec
from grouped_conv_jax.tuning import calls
from grouped_conv_jax.tuning.calls import Call


@dataclasses.dataclass(frozen=True)
class Occurrence:
    """One contraction of one spec, on one device.

    Attributes:
      contraction: which one.
      spec: of what one device computes, mapped axes merged.
      implementation: the one asked for, if any.
      choices: of the tuning in whose context it was traced, if any.
      device: the kind that it is compiled for.
      times: how often it is computed, as far as is known: once for the rounds of a
        `lax.while_loop`, and in every branch of a `lax.cond`.
      divided_over: the mesh that XLA divides `spec` over by itself; None if `spec` is what one
        device computes.
    """

    contraction: Contraction
    spec: ConvSpec
    implementation: str | None
    choices: Choices | None
    device: Device
    times: int = 0
    divided_over: Mesh | None = None


def occurrences(
    function: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Occurrence]:
    """Those of `function(*args, **kwargs)`, in the order of the program; none that is empty.

    What is not an array (or a `jax.ShapeDtypeStruct`) among the arguments is static.
    """
    arrays, traced_call = calls.traced(Call(function, tuple(args), dict(kwargs)))
    devices = _devices(arrays, traced_call.jaxpr)
    check_one_platform(devices)
    here = Device.of(devices[0])
    settled: Counter[Equation] = Counter()
    shared: Counter[Equation] = Counter()
    are_several = max(len(devices), jax.device_count()) > 1
    _count(traced_call.jaxpr, 1, settled, shared if are_several else settled)
    found: list[tuple[Equation, ConvSpec, Device, Mesh | None, int]]
    found = [(equation, equation.spec, here, None, times) for equation, times in settled.items()]
    found += _compiled(traced_call, shared, here)
    total: Counter[Occurrence] = Counter()
    for (contraction, _, implementation, choices), spec, device, divided_over, times in found:
        if not spec.is_empty:
            occurrence = Occurrence(
                contraction,
                spec.merged(),
                asked_for(implementation, contraction),
                choices,
                device,
                divided_over=divided_over,
            )
            total[occurrence] += times
    return [dataclasses.replace(o, times=times) for o, times in total.items()]


def _count(jaxpr: Any, times: int, settled: Counter[Equation], shared: Counter[Equation]) -> None:
    """Counts equations, as settled those in `shard_map`, whose shapes are those of one device."""
    for equation in jaxpr.eqns:
        if equation.primitive is grouped_conv_p:
            kinds = equation.outvars[0].aval.sharding.mesh.axis_types
            is_manual = bool(kinds) and all(kind == AxisType.Manual for kind in kinds)
            key = Equation(*(equation.params[name] for name in Equation._fields))
            (settled if is_manual else shared)[key] += times
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            _count(inner, times * repeats, settled, shared)


def _compiled(
    traced: Any, shared: Counter[Equation], here: Device
) -> Iterator[tuple[Equation, ConvSpec, Device, Mesh | None, int]]:
    """What becomes of the equations that devices may share."""
    if not shared:
        return
    watch = Watch()
    with watching(watch):
        lowered = traced.lower()
        if shared.keys() - {equation for equation, *_ in watch.seen}:
            lowered.compile()
    kinds = Counter(equation for equation, *_ in watch.seen)
    for (equation, spec, device, divided_over), seen in watch.seen.items():
        # What is lowered once for many places, or iterated, is seen once. Where the same equation
        # is shared in two ways, the places are what there is.
        times = shared[equation] if kinds[equation] == 1 else seen
        yield equation, spec, device if device.is_known else here, divided_over, times


def _devices(arrays: Sequence[Any], jaxpr: Any) -> list[Any]:
    """Returns the devices that a function is for, which may be those of a topology.

    They are those of the first array that is on some (a `jax.ShapeDtypeStruct` is on those of its
    sharding), or else those of the mesh of the context or of a `shard_map`, or else JAX's default.
    """
    shardings = (getattr(x, "sharding", None) for x in arrays if not isinstance(x, Tracer))
    for sharding in shardings:
        if isinstance(sharding, Sharding) and not _is_abstract(sharding):
            return sorted(sharding.device_set, key=lambda device: device.id)
    for mesh in (jax.sharding.get_mesh(), *_meshes(jaxpr)):
        if isinstance(mesh, Mesh) and not mesh.empty:
            return list(mesh.devices.flat)
    return list(jax.device_put(0).devices())


def _is_abstract(sharding: Sharding) -> bool:
    return isinstance(getattr(sharding, "mesh", None), AbstractMesh)


def _meshes(jaxpr: Any) -> Iterator[Any]:
    """Yields the meshes of the `shard_map`s of a program."""
    for equation in jaxpr.eqns:
        yield equation.params.get("mesh")
        for inner in jaxprs_in_params(equation.params):
            yield from _meshes(inner)
