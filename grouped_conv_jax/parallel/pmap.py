"""`jax.pmap` of programs that are written for a mesh of several axes.

`pmap` has one axis, which numbers all devices, and pmaps cannot be nested. A collective over one of
several mesh axes is then a collective over that one axis among groups of devices. The program is
traced with the mesh axes' names, and its collectives are bound anew; whoever wrote it, and the nets
it calls, need not know of it.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from grouped_conv_jax.jax_compat import ClosedJaxpr, Jaxpr, Literal

DEVICE = "devices of pmap"
"""The axis of pmap: the devices of the mesh, in the order of `mesh.devices.flat`."""

NAMES_IN = {
    "psum": "axes",
    "pmax": "axes",
    "pmin": "axes",
    "all_gather": "axis_name",
    "reduce_scatter": "axis_name",
    "all_to_all": "axis_name",
}
"""The collectives that a program may call, and the parameter of each that names the axes."""


class Pmap:
    """`jax.pmap` with the arguments and the meaning of `jax.shard_map(check_vma=False)`.

    A function of global arrays, to be called outside of `jax.jit`. pmap's own arrays are stacked by
    device; from and to them each device's part is taken as it is, nothing travels, and the memory
    of donated arguments is passed along.

    Args:
      function: what each device computes, from its parts of the arguments; it may talk over the
        axes of `mesh` with the collectives in `NAMES_IN`, outside of loops and branches.
      mesh: the devices.
      in_specs: PartitionSpecs, or trees of them, of each argument.
      out_specs: PartitionSpecs of the results.
      donate_argnums: arguments that are used up.

    Raises:
      NotImplementedError: there are several processes, where pmap takes no global arrays.
    """

    def __init__(
        self,
        function: Callable,
        mesh: Mesh,
        in_specs: Sequence[Any],
        out_specs: Any,
        donate_argnums: Sequence[int] = (),
    ):
        if jax.process_count() > 1:
            raise NotImplementedError("pmap runs in one process only; shard_map in several")
        by_device = PartitionSpec(mesh.axis_names)

        def stack(specs: Any, donate: bool) -> Callable:
            stacked = jax.shard_map(
                lambda x: jax.tree.map(lambda part: part[None], x),
                mesh=mesh,
                in_specs=(specs,),
                out_specs=by_device,
            )
            return jax.jit(stacked, donate_argnums=0 if donate else ())

        self._stacks = [stack(specs, i in donate_argnums) for i, specs in enumerate(in_specs)]
        self._pmapped = jax.pmap(
            _over_one_axis(function, mesh),
            axis_name=DEVICE,
            devices=list(mesh.devices.flat),
            donate_argnums=donate_argnums,
        )
        unstack = jax.shard_map(
            lambda results: jax.tree.map(lambda x: x[0], results),
            mesh=mesh,
            in_specs=by_device,
            out_specs=out_specs,
            check_vma=False,
        )
        self._unstack = jax.jit(unstack, donate_argnums=0)

    def __call__(self, *args: Any) -> Any:
        """The results, as global arrays."""
        stacked = [stack(x) for stack, x in zip(self._stacks, args, strict=True)]
        return self._unstack(self._pmapped(*stacked))

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """The program of the devices, for arguments of these global shapes; nothing is run."""
        stacked = [jax.eval_shape(stack, x) for stack, x in zip(self._stacks, args, strict=True)]
        return self._pmapped.lower(*stacked)


def _over_one_axis(function: Callable, mesh: Mesh) -> Callable:
    """`function`, its collectives over axes of `mesh` bound over `DEVICE`."""

    def evaluate(*args):
        axes = list(mesh.shape.items())
        trace = jax.make_jaxpr(function, axis_env=axes, return_shape=True)
        closed, shapes = trace(*args)
        results = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), mesh)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return evaluate


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], mesh: Mesh) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(variable):
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        scope = str(equation.source_info.name_stack)
        with jax.named_scope(scope) if scope else nullcontext(), equation.ctx.manager:
            results = _bind(equation, operands, mesh)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _bind(equation: Any, operands: list[Any], mesh: Mesh) -> Sequence[Any]:
    primitive, params = equation.primitive, equation.params
    inner = params.get("jaxpr")
    if primitive.name == "jit" and isinstance(inner, ClosedJaxpr):
        return _evaluate(inner.jaxpr, inner.consts, operands, mesh)
    if primitive.name == "axis_index":
        return [_axis_index(params["axis_name"], mesh)]
    params = primitive.get_bind_params(params)
    if primitive.name in NAMES_IN:
        name = NAMES_IN[primitive.name]
        names = (params[name],) if isinstance(params[name], str) else params[name]
        if params["axis_index_groups"] is not None:
            raise NotImplementedError(f"{primitive.name} with axis_index_groups within pmap")
        params = params | {name: (DEVICE,), "axis_index_groups": _index_groups(names, mesh)}
    results = primitive.bind(*operands, **params)
    return results if primitive.multiple_results else [results]


def _axis_index(name: str, mesh: Mesh) -> jax.Array:
    position = mesh.axis_names.index(name)
    inner = math.prod(mesh.axis_sizes[position + 1 :])
    return lax.axis_index(DEVICE) // inner % mesh.axis_sizes[position]


def _index_groups(names: Sequence[str], mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """The devices, numbered as on `DEVICE`, that talk to each other over the axes `names`."""
    numbers = np.arange(mesh.size).reshape(mesh.axis_sizes)
    positions = [mesh.axis_names.index(name) for name in names]
    together = np.moveaxis(numbers, positions, range(-len(positions), 0))
    size = math.prod(mesh.shape[name] for name in names)
    return tuple(tuple(group) for group in together.reshape(-1, size).tolist())
