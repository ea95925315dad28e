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
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

from grouped_conv_jax.contraction import grouped_conv_p
from grouped_conv_jax.devices import DeviceKind
from grouped_conv_jax.spec import Contraction, ConvSpec
from grouped_conv_jax.tuning import Choices
from grouped_conv_jax.watching import Equation, Watch, watching


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
    """

    contraction: Contraction
    spec: ConvSpec
    implementation: str | None
    choices: Choices | None
    device: DeviceKind
    times: int = 0


def occurrences(
    function: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Occurrence]:
    """Those of `function(*args, **kwargs)`, in the order of the program; none that is empty.

    What is not an array (or a `jax.ShapeDtypeStruct`) among the arguments is static.
    """
    leaves, tree = jax.tree.flatten((tuple(args), dict(kwargs)))
    traced = [_is_array(leaf) for leaf in leaves]
    arrays = [leaf for leaf, is_traced in zip(leaves, traced, strict=True) if is_traced]

    def call(*arrays: Any) -> Any:
        given = iter(arrays)
        values = [next(given) if t else x for x, t in zip(leaves, traced, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, values)
        return function(*args, **kwargs)

    traced_call = jax.jit(call).trace(*arrays)
    settled: Counter[Equation] = Counter()
    shared: Counter[Equation] = Counter()
    _count(traced_call.jaxpr, 1, settled, shared if jax.device_count() > 1 else settled)
    here = DeviceKind.of(_device(arrays))
    found = [(equation, equation.spec, here, times) for equation, times in settled.items()]
    found += _compiled(traced_call, shared, here)
    total: Counter[Occurrence] = Counter()
    for (contraction, _, implementation, choices), spec, device, times in found:
        if not spec.is_empty:
            total[Occurrence(contraction, spec.merged(), implementation, choices, device)] += times
    return [dataclasses.replace(o, times=times) for o, times in total.items()]


def _is_array(x: Any) -> bool:
    # NumPy's scalar types have these names, too.
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)


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
    traced: Any, shared: Counter[Equation], here: DeviceKind
) -> Iterator[tuple[Equation, ConvSpec, DeviceKind, int]]:
    """What becomes of the equations that devices may share."""
    if not shared:
        return
    watch = Watch()
    with watching(watch):
        lowered = traced.lower()
        if shared.keys() - {equation for equation, *_ in watch.seen}:
            lowered.compile()
    kinds = Counter(equation for equation, *_ in watch.seen)
    for (equation, spec, device), seen in watch.seen.items():
        # What is lowered once for many places, or iterated, is seen once. Where the same equation
        # is shared in two ways, the places are what there is.
        yield equation, spec, device or here, shared[equation] if kinds[equation] == 1 else seen


def _device(arrays: Sequence[Any]) -> Any:
    """That of the first array, or what would be that of a new one."""
    known = (x for x in arrays if isinstance(x, jax.Array) and not isinstance(x, Tracer))
    return min(next(known, jax.device_put(0)).devices(), key=lambda device: device.id)
