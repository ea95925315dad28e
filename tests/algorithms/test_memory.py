"""Temporary memory: no contraction that is chosen stores more than lax, or three times its arrays.

`memory_analysis` is exact, and the same on every machine with the same instructions. The programs
are compiled as users compile them, in a process of their own where the tests compile quickly.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import memory_table
import numpy as np
import pytest
from cases import Case, each_case, named
from compilation import optimized
from fake_algorithms import CPU
from jax.sharding import PartitionSpec as P
from jaxprs import convolutions
from meshes import make_mesh

from benchmarks.memory import CALLS, CONTRACTIONS, DTYPES, Call, Need
from grouped_conv_jax import grouped_conv, native
from grouped_conv_jax.algorithms import choice, dense, memory, patches, taps
from grouped_conv_jax.algorithms.table import TABLE, unsupported
from grouped_conv_jax.spec import OPERANDS, ConvSpec

FEW = ("depthwise_x4", "regnetx_w24")
"""What the default test compiles."""


def spec_of(call: Call, dtype="float32", **more) -> ConvSpec:
    operands = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in (call.lhs, call.rhs)]
    arguments = {**call.arguments, **more}
    (equation,) = convolutions(lambda x, w: grouped_conv(x, w, **arguments), *operands)
    return equation.params["spec"]


def needs(folder: Path, dtypes, calls, without_native: bool = False) -> list[Need]:
    """Compiles as users do, and returns what was found."""
    results = folder / "memory.json"
    code = "import sys, memory_table; "
    if without_native:
        code += "from grouped_conv_jax import native; native.missing = lambda: 'no kernels'; "
    code += "memory_table.main(sys.argv[1:])"
    options = ("--results", results, "--page", folder / "memory.md", "--dtypes", *dtypes)
    environment = {**optimized(), "JAX_PLATFORMS": "cpu"}
    examples = str(Path(memory_table.__file__).parent)
    environment["PYTHONPATH"] = os.pathsep.join([examples, *sys.path])
    subprocess.run(
        [sys.executable, "-c", code, *map(str, options), "--calls", *calls],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return [Need(**row) for row in json.loads(results.read_text())["needs"]]


def check(found: list[Need]) -> None:
    """Neither of the two bounds is exceeded by more than the allowance."""
    for n in found:
        preferred = DTYPES[n.dtype]
        with jax.enable_x64(True):
            spec = spec_of(CALLS[n.call], n.dtype, preferred_element_type=preferred)
        allowed = memory.allowance(spec)
        assert n.ours <= max(n.lax + memory.ALWAYS_ALLOWED, allowed), n
        # lax itself needs four times 8-bit arrays; where all need more than three, none needs more.
        assert n.ours <= max(3 * n.arrays, allowed) or n.ours <= n.lax, n
        # In 8 to 16 bits, and for complex numbers, lax stores copies of the arrays.
        if jnp.issubdtype(n.dtype, jnp.complexfloating) or spec.accumulator != spec.wide_dtype:
            assert n.ours <= n.lax + memory.ALWAYS_ALLOWED, n


def test_what_is_chosen_stores_no_more_than_lax(tmp_path):
    check(needs(tmp_path, ["float32", "float16", "float8_e4m3fn"], FEW))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_everything_that_is_chosen_stores_no_more_than_lax(dtype, tmp_path):
    check(needs(tmp_path, [dtype], CALLS))


@pytest.mark.slow
def test_without_native_kernels_too(tmp_path):
    check(needs(tmp_path, ["float32"], CALLS, without_native=True))


# The parts of the batch.


THREE_EXAMPLES = named("rank 1")


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        "bfloat16",
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("float8_e4m3fn", "complex64", "int32")),
    ],
)
@pytest.mark.parametrize("name", ["taps", "dense", "patches"])
@each_case(THREE_EXAMPLES)
def test_parts_of_the_batch_are_the_whole(case: Case, name, dtype, monkeypatch):
    spec = spec_of(Call(case.lhs, case.rhs, case.arguments), dtype)
    arrays = dict(zip(("lhs", "rhs", "out"), case.random(np.float32), strict=True))
    for contraction in CONTRACTIONS:
        if unsupported(name, contraction, spec, CPU):
            continue
        compute = getattr(TABLE[name], contraction)
        operands = [
            jnp.asarray(4 * arrays[role]).astype(spec.role_dtype(role))
            for role in OPERANDS[contraction]
        ]
        whole = jax.jit(lambda a, b, f=compute: f(a, b, spec))(*operands)
        with monkeypatch.context() as patch:
            patch.setattr(memory, "examples_at_once", lambda *_: 1)
            parts = jax.jit(lambda a, b, f=compute: f(a, b, spec))(*operands)
        assert parts.dtype == whole.dtype
        wide = np.complex128 if dtype == "complex64" else np.float64
        whole, parts = (np.asarray(x).astype(wide) for x in (whole, parts))
        tolerance = {"bfloat16": 1e-2, "float8_e4m3fn": 0.15}.get(dtype, 1e-5)
        np.testing.assert_allclose(parts, whole, tolerance, tolerance * np.abs(whole).max())


@pytest.mark.parametrize("implementation", ["patches", "taps", "dense"])
def test_parts_inside_shard_map_are_those_of_one_device(implementation, monkeypatch):
    monkeypatch.setattr(memory, "examples_at_once", lambda *_: 1)
    mesh = make_mesh(data=2)
    (case,) = named("NHWC")
    conv = case.conv(implementation)

    def gradients(x, w):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(conv(x, w))), (0, 1))(x, w)

    x, w = (jnp.concatenate([a] * 4) if i == 0 else a for i, a in enumerate(case.random()[:2]))
    sharded = jax.shard_map(
        gradients, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P())
    )
    for found, expected in zip(jax.jit(sharded)(x, w), gradients(x, w), strict=True):
        np.testing.assert_allclose(found, expected, 1e-4, 1e-4)


def test_only_a_cpu_computes_in_parts():
    spec = spec_of(CALLS["depthwise_x4"], "float16")
    operands = [jax.ShapeDtypeStruct(spec.shape(r), "float16") for r in OPERANDS["wgrad"]]
    traced = jax.jit(lambda a, b: TABLE["taps"].wgrad(a, b, spec)).trace(*operands)
    loops = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert loops["cpu"] > loops["cuda"] == loops["tpu"]


def test_as_many_examples_as_the_limit_allows():
    """In equal parts: of 8 examples 4, 2 or 1, of 7 all or 1."""
    spec = spec_of(CALLS["depthwise_x4"], "float16")
    limit = memory.limit("wgrad", spec)

    def estimate(contraction, spec):
        return memory.batch_size(spec) * limit // 4

    sums = 2 * memory.array_bytes(spec, "rhs", 4)
    assert memory.examples_at_once(estimate, "wgrad", spec) == 2
    assert memory.in_parts(estimate, "wgrad", spec) == 2 * limit // 4 + sums
    seven = memory.with_batch(spec, 7)
    assert memory.examples_at_once(lambda *_: 0, "wgrad", seven) == 7
    assert memory.examples_at_once(estimate, "wgrad", seven) == 1


@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float32", "complex64"])
def test_the_choice_heeds_the_estimates(dtype, contraction, monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "there are none")
    for call in CALLS.values():
        spec = spec_of(call, dtype)
        chosen = choice.choose(contraction, spec, CPU)
        stored = TABLE[chosen].temporary_bytes(contraction, spec)
        lax_stores = TABLE["xla"].temporary_bytes(contraction, spec)
        assert stored <= max(memory.limit(contraction, spec), lax_stores)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float32", "bfloat16"])
@pytest.mark.parametrize("module", [taps, dense, patches])
def test_estimates_are_upper_bounds(module, dtype, tmp_path):
    """Of the whole batch; `check` has the same of its parts."""
    code = """if True:
        import json, sys, jax
        from grouped_conv_jax.algorithms import memory
        memory.examples_at_once = lambda estimate, contraction, spec: memory.batch_size(spec)
        from benchmarks.memory import CALLS, _arrays, _ours, temporary_bytes
        from benchmarks.workloads import USED
        name, dtype, *calls = sys.argv[1:]
        for call in calls:
            arrays = _arrays(CALLS[call], dtype)
            for contraction, compute in _ours(CALLS[call], dtype, implementation=name).items():
                operands = [arrays[role] for role in USED[contraction]]
                compiled = jax.jit(compute).lower(*operands).compile()
                print(json.dumps([call, contraction, temporary_bytes(compiled)]))
    """
    name = module.__name__.rpartition(".")[2]
    calls = {
        "taps": ("depthwise_x4", "depthwise_x4_stride2", "mobilenet_dw", "resnext_s2_stride2"),
        "dense": ("alexnet_conv4", "resnext_s3", "volume", "channels_first"),
        "patches": ("shufflenet_1x1", "dilated", "sequence"),
    }[name]
    environment = {**optimized(), "JAX_PLATFORMS": "cpu"}
    examples = str(Path(memory_table.__file__).parent)
    environment["PYTHONPATH"] = os.pathsep.join([examples, *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, name, dtype, *calls],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        call, contraction, stored = json.loads(line)
        spec = spec_of(CALLS[call], dtype)
        estimate = module._stored(contraction, spec)
        margin = memory.ALWAYS_ALLOWED + math.prod(CALLS[call].rhs)
        assert stored <= 1.05 * estimate + margin, (call, contraction, estimate)
