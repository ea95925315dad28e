"""The native kernels: every instruction set, every way to be called, and what they refuse."""

import concurrent.futures
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import native_cases
import numpy as np
import oracle
import pytest
from cases import CASES, Case, every_case, named
from comparison import assert_matches_the_oracle, value_and_gradients
from native_cases import LARGE, conv2d

from grouped_conv_jax import explain, grouped_conv, implementations, native
from grouped_conv_jax.algorithms import Device
from grouped_conv_jax.algorithms.table import unsupported

if native.missing():
    pytest.skip(f"there are no native kernels: {native.missing()}", allow_module_level=True)

# The best and the plainest one always, the others among the slow tests.
every_instruction_set = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if 0 < i < len(names) - 1 else ())
        for names in [native.instruction_sets()]
        for i, name in enumerate(names)
    ],
)


@pytest.fixture
def only():
    """Makes an instruction set the best one; afterwards it is as before."""
    yield native.use_instruction_set
    native.use_instruction_set(native.instruction_sets()[0])


WIDTHS = [(1, 1), (1, 2), (1, 3), (3, 1), (2, 2), (4, 4), (8, 8), (16, 16), (32, 32)]
WIDTHS += [(3, 5), (5, 3), (6, 6), (12, 12), (17, 17), (24, 24), (33, 48), (64, 3)]
"""Inputs and outputs of a group: one, some and parts of a vector."""


def of_width(inputs: int, outputs: int, groups: int = 3, **more) -> Case:
    lhs, rhs = (2, 9, 17, groups * inputs), (3, 3, inputs, groups * outputs)
    return conv2d(lhs, rhs, groups, **more)


@every_instruction_set
@every_case
def test_every_case_by_every_instruction_set(case, name, only):
    only(name)
    operands = case.random()
    compute = jax.jit(value_and_gradients(case.conv("native")))
    try:
        found = compute(*operands)
    except NotImplementedError:
        spatial = len(case.lhs) - 2
        assert spatial > 2
        pytest.skip(f"{spatial} spatial dimensions")
    assert_matches_the_oracle(found, case, operands)


@every_instruction_set
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_every_width_by_every_instruction_set(width, name, only):
    only(name)
    for more in ({}, {"strides": (2, 2)}, {"dilation": (2, 1), "padding": ((3, 1), (0, 4))}):
        case = of_width(*width, **more)
        operands = case.random()
        found = value_and_gradients(case.conv("native"))(*operands)
        assert_matches_the_oracle(found, case, operands)


PLACES = {
    "in place": conv2d((2, 9, 40, 32), (3, 3, 1, 32), 32),
    "in place, edges only": conv2d((2, 9, 16, 32), (3, 7, 1, 32), 32, padding=((1, 1), (3, 3))),
    "in place, stride": conv2d((2, 13, 61, 32), (3, 3, 4, 32), 8, strides=(2, 2)),
    "in place, cropped": conv2d((2, 9, 50, 16), (3, 3, 1, 16), 16, padding=((-1, 2), (-3, 4))),
    "in place, wide padding": conv2d((1, 5, 40, 16), (3, 3, 1, 16), 16, padding=((4, 4), (6, 0))),
    "in place, far taps": conv2d((1, 30, 40, 16), (3, 3, 1, 16), 16, dilation=(9, 11)),
    "two short rows": conv2d((2, 14, 14, 64), (3, 3, 16, 64), 4),
    "two short rows, odd": conv2d((2, 7, 7, 96), (3, 3, 32, 96), 3),
    "two short rows, stride": conv2d((2, 13, 13, 48), (3, 3, 24, 48), 2, strides=(2, 2)),
    "one short row": conv2d((2, 1, 12, 64), (1, 3, 32, 64), 2),
}


@every_instruction_set
@pytest.mark.parametrize("place", PLACES)
def test_where_rows_are_read(place, name, only):
    only(name)
    case = PLACES[place]
    operands = case.random()
    found = value_and_gradients(case.conv("native"))(*operands)
    assert_matches_the_oracle(found, case, operands)


@pytest.mark.usefixtures("x64")
@every_instruction_set
@pytest.mark.parametrize("width", WIDTHS[::2], ids=str)
def test_64_bits(width, name, only):
    only(name)
    case = of_width(*width)
    operands = case.random(np.float64)
    found = value_and_gradients(case.conv("native"))(*operands)
    assert {x.dtype for x in found} == {np.dtype(np.float64)}
    for mine, theirs in zip(found, oracle_of(case, operands), strict=True):
        np.testing.assert_allclose(mine, theirs, 1e-12, 1e-12)


@every_instruction_set
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_16_bits_are_added_up_in_32(width, name, only):
    only(name)
    case = of_width(*width)
    operands = case.random(ml_dtypes.bfloat16)
    found = value_and_gradients(case.conv("native"))(*operands)
    for mine, theirs in zip(found, oracle_of(case, operands), strict=True):
        assert mine.dtype == jnp.bfloat16
        # One rounding to 8 bits, after sums of 24.
        np.testing.assert_allclose(np.asarray(mine, np.float64), theirs, 2**-8, 1e-4)


def oracle_of(case: Case, operands):
    x, w, y = (np.asarray(a, np.float64) for a in operands)
    return oracle.contractions(x, w, y, **case.arguments)


def test_32_bits_of_16():
    """`preferred_element_type`: forwards and backwards."""
    case = of_width(4, 4)
    x, w, y = case.random()
    conv = case.conv("native", preferred_element_type=jnp.float32)
    out, transposed = jax.vjp(conv, jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16))
    assert [out.dtype, *(g.dtype for g in transposed(jnp.asarray(y)))] == [
        jnp.float32,
        jnp.bfloat16,
        jnp.bfloat16,
    ]
    x, w = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, w))
    np.testing.assert_allclose(out, oracle.forward(x, w, **case.arguments), 1e-5, 1e-5)


@every_instruction_set
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_an_infinite_weight_reaches_does_not_depend_on_the_batch(dtype, name, only):
    """Where rows are computed together, and where tiles are of fewer rows."""
    only(name)
    weights = np.ones((3, 3, 16, 64), dtype)
    weights[2, 1] = np.inf
    found = []
    for batch in (1, 4, 8):
        case = conv2d((batch, 14, 14, 64), weights.shape, 4)
        found.append(np.asarray(case.conv("native")(np.ones(case.lhs, dtype), weights))[0])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert np.isfinite(np.asarray(found[0][-1], np.float32)).all()
    assert np.isposinf(np.asarray(found[0][:-1], np.float32)).all()


# However it is called.


def test_the_same_bits_from_run_to_run():
    for case in (LARGE, conv2d((5, 30, 30, 48), (3, 3, 1, 48), 48)):
        operands = case.random()
        compute = jax.jit(value_and_gradients(case.conv("native")))
        first = compute(*operands)
        for _ in range(20):
            for a, b in zip(first, compute(*operands), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_from_several_host_threads_at_once(dtype):
    case = LARGE if dtype == np.float32 else conv2d((4, 40, 40, 64), (3, 3, 32, 64), 2)
    compute = jax.jit(value_and_gradients(case.conv("native")))
    operands = case.random(dtype)
    expected = compute(*operands)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: compute(*operands), range(64)):
            for a, b in zip(expected, found, strict=True):
                np.testing.assert_array_equal(a, b)


def test_on_several_devices_at_once():
    devices = jax.devices()
    assert len(devices) == 8
    compute = jax.jit(value_and_gradients(LARGE.conv("native")))
    operands = LARGE.random()
    expected = compute(*operands)
    there = [compute(*jax.device_put(operands, device)) for device in devices]
    for found in there:
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a, b)


def test_inside_a_loop_and_a_branch():
    case = of_width(4, 4)
    x, w, _ = case.random()
    conv = case.conv("native")

    @jax.jit
    def repeated(x):
        x, _ = jax.lax.scan(lambda x, _: (0.1 * conv(x, w), None), x, length=5)
        return jax.lax.cond(x.sum() > 1e9, lambda x: x, lambda x: conv(x, w), x)

    expected = x
    for _ in range(5):
        expected = 0.1 * case.conv("xla")(expected, w)
    np.testing.assert_allclose(repeated(x), case.conv("xla")(expected, w), 1e-4, 1e-6)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e-42, -0.0])
@pytest.mark.parametrize("width", [(1, 1), (4, 4), (8, 8), (3, 5), (16, 16)], ids=str)
@every_instruction_set
def test_what_is_not_an_ordinary_number(name, width, value, only):
    """Infinities, NaN and denormal numbers go where they belong, and nowhere else."""
    only(name)
    case = of_width(*width)
    x, w, y = case.random()
    x[:, 4, 5, 0] = value
    out = np.asarray(case.conv("native")(x, w))
    dw = jax.vjp(case.conv("native"), x, w)[1](y)[1]
    outputs = width[1]
    touched = np.zeros(case.out, bool)
    touched[:, 3:6, 4:7, :outputs] = True
    assert np.isfinite(out[~touched]).all()
    if np.isfinite(value):
        np.testing.assert_allclose(out, oracle.forward(x, w, **case.arguments), 1e-5, 1e-5)
    else:
        assert not np.isfinite(out[touched]).any()
        assert not np.isfinite(dw[:, :, 0, :outputs]).any()
        assert np.isfinite(dw[..., outputs:]).all()


def test_denormal_numbers_are_what_they_are_to_xla():
    """Its threads take them for zeros, or do not."""
    x = jnp.full((1, 1, 4, 4), 1e-40)
    w = jnp.ones((1, 1, 1, 4))
    case = conv2d(x.shape, w.shape, 4)
    ours, theirs = (np.asarray(case.conv(name)(x, w)) for name in ("native", "xla"))
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@every_instruction_set
@pytest.mark.parametrize(
    ("inputs", "outputs", "groups"), [(4, 28, 129), (1, 8, 520), (8, 16, 268)], ids=str
)
def test_chunks_of_which_the_last_is_smaller(inputs, outputs, groups, name, only):
    only(name)
    lhs, rhs = (2, 9, 14, groups * inputs), (3, 3, inputs, groups * outputs)
    case = conv2d(lhs, rhs, groups)
    x, w, _ = case.random()
    found, expected = (case.conv(name)(x, w) for name in ("native", "xla"))
    np.testing.assert_allclose(found, expected, 1e-4, 1e-4)


@every_instruction_set
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("columns", [16, 17])
def test_an_infinity_at_an_edge_reaches_the_taps_that_see_it(columns, dtype, name, only):
    only(name)
    case = conv2d((1, 5, columns, 8), (3, 3, 4, 8), 2)
    x, w, y = (jnp.asarray(a, dtype) for a in case.random())
    x = x.at[:, 2, columns - 1, 0].set(jnp.inf)
    dw = np.asarray(jax.vjp(case.conv("native"), x, w)[1](y)[1], np.float32)
    # The last column is read by the middle and the right tap of the results at the edge.
    assert np.isfinite(dw[:, 0]).all()
    assert not np.isfinite(dw[:, 1, 0, :4]).any()


def test_a_row_that_is_longer_than_a_cache():
    """One dimension, many elements: cut into tiles along it, too."""
    arguments = {
        "window_strides": (1,),
        "padding": [(3, 0)],
        "dimension_numbers": ("NWC", "WIO", "NWC"),
        "feature_group_count": 8,
    }
    case = Case("long", (1, 50_001, 8), (4, 1, 8), arguments)
    operands = case.random()
    found = value_and_gradients(case.conv("native"))(*operands)
    assert_matches_the_oracle(found, case, operands)


# Programs that are kept, processes that are made.


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


CACHED = """
import sys, jax, jax.numpy as jnp
from grouped_conv_jax import grouped_conv
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
layout = ("NHWC", "HWIO", "NHWC")
conv = lambda x, w: grouped_conv(x, w, (1, 1), "SAME", dimension_numbers=layout,
                                 feature_group_count=2, implementation="native")
compute = jax.jit(jax.value_and_grad(lambda x, w: conv(x, w).sum(), (0, 1)))
x, w = jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 4, 8))
print(compute(x, w)[0], "/jax/compilation_cache/cache_hits" in hits)
"""


def test_the_persistent_compilation_cache_keeps_it(tmp_path):
    first, second = (run(CACHED, str(tmp_path)).split() for _ in range(2))
    assert first[0] == second[0] == "3200.0"
    assert second[1] == "True"


SERIALIZED = """
import sys, pickle, jax, jax.numpy as jnp
from jax.experimental.serialize_executable import deserialize_and_load
import grouped_conv_jax
with open(sys.argv[1], "rb") as file:
    program = deserialize_and_load(*pickle.load(file))
print(program(jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 4, 8))).sum())
"""


def test_a_serialized_executable_runs_in_another_process(tmp_path):
    import pickle

    from jax.experimental.serialize_executable import serialize

    case = conv2d((1, 4, 4, 8), (3, 3, 4, 8), 2)
    x, w = jnp.ones(case.lhs), jnp.ones(case.rhs)
    program = jax.jit(case.conv("native")).lower(x, w).compile()
    (tmp_path / "program").write_bytes(pickle.dumps(serialize(program)))
    assert float(run(SERIALIZED, str(tmp_path / "program"))) == 3200


FORKED = """
import os, sys
import jax, jax.numpy as jnp
from grouped_conv_jax import grouped_conv
def check():
    layout = ("NHWC", "HWIO", "NHWC")
    out = grouped_conv(jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 4, 8)), (1, 1), "SAME",
                       dimension_numbers=layout, feature_group_count=2, implementation="native")
    assert out.sum() == 3200, out.sum()
child = os.fork()  # The library is loaded; JAX has not started its threads.
check()
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_a_forked_process_computes_as_well():
    run(FORKED)


ONE_THREAD = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, numpy as np, sys
sys.path.insert(0, sys.argv[1])
from native_cases import LARGE
from comparison import assert_matches_the_oracle, value_and_gradients
operands = LARGE.random()
assert_matches_the_oracle(value_and_gradients(LARGE.conv("native"))(*operands), LARGE, operands)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_with_one_thread():
    run(ONE_THREAD, str(Path(native_cases.__file__).parent))


# What is refused.


def call(contraction, out_shape, *operands, groups=1, dimensions=()):
    return jax.ffi.ffi_call(
        native.target(contraction), jax.ShapeDtypeStruct(out_shape, operands[0].dtype)
    )(*operands, groups=np.int64(groups), dimensions=np.asarray(dimensions, np.int64))


GOOD = [5, 5, 3, 1, 1, 1, 1] * 2
"""The two dimensions of the convolution below: operand, results, taps, stride, dilation, gaps and
padding before.
"""


def changed(position: int, value: int) -> list[int]:
    return [value if i == position else n for i, n in enumerate(GOOD)]


@pytest.mark.parametrize(
    ("dimensions", "groups", "message"),
    [
        ([], 2, "expected 14 numbers"),
        (GOOD[:13], 2, "expected 14 numbers"),
        (GOOD, 0, "not a multiple of the groups"),
        (GOOD, -2, "not a multiple of the groups"),
        (GOOD, 3, "not a multiple of the groups"),
        (GOOD, 1, "do not fit"),
        (changed(0, 6), 2, "do not fit"),
        (changed(8, 2**40), 2, "do not fit"),
        (changed(9, -3), 2, "do not fit"),
        (changed(3, 0), 2, "must be from 1"),
        (changed(3, -1), 2, "must be from 1"),
        (changed(3, 2**62), 2, "must be from 1"),
        (changed(4, 0), 2, "must be from 1"),
        (changed(4, -(2**63)), 2, "must be from 1"),
        (changed(5, 0), 2, "must be from 1"),
        (changed(12, 2**30), 2, "must be from 1"),
        (changed(13, -(2**63)), 2, "must be from 1"),
        (changed(6, 2**62), 2, "must be from 1"),
    ],
)
def test_the_handler_checks_what_it_is_given(dimensions, groups, message):
    x, w = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 2, 4))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        call("fprop", x.shape, x, w, groups=groups, dimensions=dimensions)
    np.testing.assert_allclose(call("fprop", x.shape, x, w, groups=2, dimensions=GOOD)[0, 2, 2], 18)


@pytest.mark.parametrize("dilation", [2**29, 2**24])
def test_the_handler_does_not_take_more_memory_than_there_is(dilation):
    x, w = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 2, 4))
    dimensions = [5, 5, 3, 1, dilation, 1, 1] * 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="no memory for packed arrays"):
        call("fprop", x.shape, x, w, groups=2, dimensions=dimensions)


def test_the_handler_checks_ranks_and_types():
    x, w = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 2, 4))
    with pytest.raises(jax.errors.JaxRuntimeError, match="four dimensions"):
        call("fprop", x.shape, x[0], w, groups=2, dimensions=GOOD)
    with pytest.raises(jax.errors.JaxRuntimeError, match="of several types"):
        call("fprop", x.shape, x, w.astype(jnp.bfloat16), groups=2, dimensions=GOOD)
    with pytest.raises(jax.errors.JaxRuntimeError, match="unsupported type"):
        call("fprop", x.shape, x.astype(jnp.float16), w.astype(jnp.float16), dimensions=GOOD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lhs": (1, 4, 3, 3, 3), "rhs": (4, 2, 1, 1, 1)}, "at most two spatial dimensions"),
        ({"dtype": "float16"}, "it computes float32, float64, bfloat16"),
        ({"dtype": "int32"}, "it computes float32, float64, bfloat16"),
        ({"padding": [(2**30, 0), (0, 0)]}, "a size is 1073741824 or more"),
        ({"lhs": (1, 4, 2**24, 5), "rhs_dilation": (2**22, 1)}, "dilated, is too large"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(arguments, message):
    lhs, rhs = arguments.pop("lhs", (1, 4, 5, 5)), arguments.pop("rhs", (4, 2, 3, 3))
    dtype = arguments.pop("dtype", "float32")
    spatial = len(lhs) - 2
    arguments = {"padding": "VALID", **arguments}
    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape in (lhs, rhs))

    def conv(x, w, implementation=None):
        return grouped_conv(
            x,
            w,
            (1,) * spatial,
            feature_group_count=2,
            implementation=implementation,
            **arguments,
        )

    with pytest.raises(NotImplementedError, match=message):
        jax.jit(conv, static_argnames="implementation").lower(x, w, implementation="native")
    jax.jit(conv).lower(x, w)


def test_it_is_for_cpus():
    (case,) = named("NHWC")
    spec = explain(case.conv(), *case.random()[:2]).contractions[0][0].spec
    for platform in ("cuda", "rocm", "tpu", "another platform"):
        assert unsupported("native", "fprop", spec, Device(platform)) == "it is for CPUs"


def test_without_the_library_everything_works_and_explain_says_why(monkeypatch):
    reason = "no C++ compiler was found when it was installed"
    monkeypatch.setattr(native, "missing", lambda: reason)
    case = of_width(4, 4, strides=(1, 2))  # That nothing else has compiled.
    operands = case.random()
    assert_matches_the_oracle(value_and_gradients(case.conv())(*operands), case, operands)
    assert f"not supported: {reason}" in str(explain(case.conv(), *operands[:2]))
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        case.conv("native")(*operands[:2])


def test_the_reason_is_the_one_that_the_installation_has_noted(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "library.so")
    monkeypatch.setattr(native, "FAILURE", tmp_path / "failure.txt")
    native._library.cache_clear()
    try:
        assert "is not there" in str(native.missing.__wrapped__())
        (tmp_path / "failure.txt").write_text("g++ failed\n")
        assert native.missing.__wrapped__() == "g++ failed"
        (tmp_path / "library.so").write_text("not a library")
        assert native.missing.__wrapped__() == "g++ failed"
    finally:
        native._library.cache_clear()


def test_it_is_in_the_list():
    assert "native" in implementations()
    assert len(CASES) > 40
