"""The one module that uses what JAX does not promise."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import grouped_conv_jax
from grouped_conv_jax import jax_compat
from grouped_conv_jax.jax_compat import Lowering, Primitive, mlir

PACKAGE = Path(grouped_conv_jax.__file__).parent
UNPROMISED = ("jax._src", "jax.experimental", "jax.extend", "jax.interpreters")
X = jnp.ones((8, 2))


def imported(source: Path) -> set[str]:
    """Returns the full names of what a module imports."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_other_module_uses_what_jax_does_not_promise():
    found = {
        source.relative_to(PACKAGE).as_posix()
        for source in PACKAGE.rglob("*.py")
        if any(name.startswith(UNPROMISED) for name in imported(source))
    }
    assert found == {"jax_compat.py"}


@pytest.fixture(scope="module")
def told():
    """A primitive that returns its operand, and what its lowerings were told."""
    told: list[Lowering] = []
    primitive = Primitive("told")
    primitive.def_abstract_eval(lambda x: x)

    def lower(context, x):
        told.append(Lowering.of("cpu", context))
        return [x]

    jax_compat.requires_devices(primitive)
    mlir.register_lowering(primitive, lower, platform="cpu")
    return primitive.bind, told


def make_mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)


def test_one_device(told):
    function, lowerings = told
    jax.jit(function).lower(X)
    lowering = lowerings.pop()
    assert lowering.devices is not None
    assert len(lowering.devices) == 1
    assert not lowering.mesh_sizes
    assert not lowering.manual_axes
    assert not lowering.is_export
    assert [x.shape for x in lowering.types] == [X.shape, X.shape]
    assert lowering.devices_of_process()[0].platform == "cpu"


def test_several_devices(told):
    function, lowerings = told
    mesh = make_mesh()
    jax.jit(function).lower(jax.device_put(X, NamedSharding(mesh, P("a"))))
    lowering = lowerings.pop()
    assert lowering.devices == tuple(mesh.devices.flat)
    assert not lowering.is_fully_manual


@pytest.mark.parametrize(("axes", "is_fully"), [({"a", "b"}, True), ({"a"}, False)])
def test_inside_shard_map(told, axes, is_fully):
    function, lowerings = told
    mesh, spec = make_mesh(), P("a")
    inside = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes)
    jax.jit(inside).lower(X)
    lowering = lowerings.pop()
    assert lowering.manual_axes == axes
    assert lowering.is_fully_manual == is_fully


def test_export(told):
    function, lowerings = told
    export.export(jax.jit(function))(X)
    assert lowerings.pop().is_export


def test_varying_axes():
    seen = []

    def function(x):
        seen.append(jax_compat.varying(x))
        return x

    spec = P("b")
    inside = jax.shard_map(function, mesh=make_mesh(), in_specs=spec, out_specs=spec)
    jax.jit(inside).lower(X)
    assert seen[-1] == {"b"}
    assert jax_compat.varying(X) == frozenset()
