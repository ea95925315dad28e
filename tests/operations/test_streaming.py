"""Causal convolution in chunks: however a sequence is cut, it is that of the whole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, each_case, random
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from grouped_conv_jax import grouped_conv
from grouped_conv_jax.operations.streaming import (
    CHANNELS_LAST,
    streaming_conv,
    streaming_conv_state,
)

LENGTH = 11


def causal(name, lhs, rhs, groups, dilation=1, dimension_numbers: Any = CHANNELS_LAST) -> Case:
    """A convolution of a whole sequence, which sees the past only."""
    layout = oracle.layouts(1, dimension_numbers)["rhs"]
    return Case(
        name,
        lhs,
        rhs,
        {
            "window_strides": (1,),
            "padding": [((rhs[layout[2]] - 1) * dilation, 0)],
            "rhs_dilation": (dilation,),
            "dimension_numbers": dimension_numbers,
            "feature_group_count": groups,
        },
    )


CASES = [
    causal("depthwise", (2, LENGTH, 6), (4, 1, 6), 6),
    causal("groups", (2, LENGTH, 6), (3, 2, 9), 3, dilation=2),
    causal("dense, wide dilation", (1, LENGTH, 3), (3, 3, 4), 1, dilation=7),
    causal("one tap", (2, LENGTH, 4), (1, 2, 4), 2),
    causal("channels first", (2, 6, LENGTH), (6, 2, 3), 3, 1, ("NCW", "OIW", "NCW")),
    causal("time first", (LENGTH, 2, 6), (6, 3, 2), 3, 2, ("WNC", "OWI", "CNW")),
]

DEPTHWISE, GROUPS, *_, TIME_FIRST = CASES
SOME = [GROUPS, TIME_FIRST]
some_cases = pytest.mark.parametrize(
    "case",
    [case if case in SOME else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=[case.name for case in CASES],
)


def time_of(case: Case, role: str) -> int:
    return oracle.layouts(1, case.arguments["dimension_numbers"])[role][2]


def settings(case: Case) -> dict[str, Any]:
    return {k: v for k, v in case.arguments.items() if k not in ("window_strides", "padding")}


def in_chunks(case: Case, lengths, state=None, **more: Any):
    """Of (x, w): the joined outputs of chunks of these lengths, and the last state."""

    def compute(x, w):
        carried, outs = state, []
        ends = np.cumsum(lengths)[:-1]
        for chunk in jnp.split(x, ends, time_of(case, "lhs")):
            out, carried = streaming_conv(chunk, w, carried, **settings(case), **more)
            outs.append(out)
        return jnp.concatenate(outs, time_of(case, "out")), carried

    return compute


def past(case: Case) -> int:
    ((low, _),) = case.arguments["padding"]
    return low


CUTS = [(LENGTH,), (1, 0, 3, 0, 5, 2), (0, LENGTH), (1,) * LENGTH, (5, 6)]


@some_cases
def test_however_it_is_cut_it_is_the_whole(case):
    x, w, _ = case.random()
    expected = oracle.forward(x, w, **case.arguments)
    length = oracle.lengths(*case.shapes, **case.arguments)[0]

    @jax.jit
    def compute(x, w):
        return [in_chunks(case, cut)(x, w) for cut in CUTS]

    time = time_of(case, "lhs")
    zeros = [(past(case) if d == time else 0, 0) for d in range(3)]
    last = np.take(np.pad(x, zeros), np.arange(-past(case), 0), time)
    for out, state in compute(x, w):
        oracle.assert_close(out, expected, length)
        np.testing.assert_array_equal(state, last)


def test_it_is_grouped_conv_with_causal_padding():
    x, w, _ = DEPTHWISE.random()
    arguments = {**settings(DEPTHWISE), "window_strides": (1,), "padding": "CAUSAL"}
    out, _ = in_chunks(DEPTHWISE, (4, 7))(x, w)
    np.testing.assert_allclose(out, grouped_conv(x, w, **arguments), 1e-6, 1e-6)


@each_case([DEPTHWISE, GROUPS])
def test_it_does_not_see_the_future(case):
    x, w, _ = case.random()
    changed = x.copy()
    changed[:, 6:] = np.nan
    out, _ = in_chunks(case, (4, 7))(changed, w)
    out = np.asarray(out)
    oracle.assert_close(out[:, :6], oracle.forward(x, w, **case.arguments)[:, :6], 12)
    assert np.isnan(out[:, 6:]).all(), "every output sees its own input"


def initial_state(case: Case, dtype: Any = None) -> jax.Array:
    shape = jax.ShapeDtypeStruct(case.rhs, np.float32)
    batch = case.lhs[oracle.layouts(1, case.arguments["dimension_numbers"])["lhs"][0]]
    return streaming_conv_state(batch, shape, **settings(case), dtype=dtype)


@some_cases
def test_the_state_before_a_sequence_is_zeros(case):
    x, w, _ = case.random()
    start = initial_state(case)
    assert start.dtype == np.float32
    assert not start.any()
    assert start.shape == streaming_conv(x, w, **settings(case))[1].shape
    actual, _ = in_chunks(case, (LENGTH,), start)(x, w)
    oracle.assert_close(actual, oracle.forward(x, w, **case.arguments), 64)


@each_case([DEPTHWISE, GROUPS])
def test_scan_one_input_at_a_time_and_its_gradient_through_time(case):
    x, w, y = case.random()

    def scanned(x, w):
        def step(state, x):
            out, state = streaming_conv(x[:, None], w, state, **settings(case))
            return state, out[:, 0]

        _, outs = jax.lax.scan(step, initial_state(case), jnp.moveaxis(x, 1, 0))
        return jnp.moveaxis(outs, 0, 1)

    @jax.jit
    def compute(x, w, y):
        out, vjp = jax.vjp(scanned, x, w)
        return out, *vjp(y)

    expected = oracle.contractions(x, w, y, **case.arguments)
    for a, e in zip(compute(x, w, y), expected, strict=True):
        oracle.assert_close(a, e, 64)


def test_gradients_flow_through_the_state():
    x, w, y = GROUPS.random()

    @jax.jit
    def compute(x, w, y):
        _, vjp = jax.vjp(lambda x, w: in_chunks(GROUPS, (3, 1, 7))(x, w)[0], x, w)
        return vjp(y)

    expected = oracle.contractions(x, w, y, **GROUPS.arguments)[1:]
    for a, e in zip(compute(x, w, y), expected, strict=True):
        oracle.assert_close(a, e, 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_state_has_the_dtype_of_the_inputs(dtype):
    x, w, _ = DEPTHWISE.random(jnp.dtype(dtype))
    start = initial_state(DEPTHWISE, dtype)
    assert start.dtype == dtype
    out, state = streaming_conv(
        x, w, start, **settings(DEPTHWISE), preferred_element_type=np.float32
    )
    assert (out.dtype, state.dtype) == (np.float32, dtype)
    expected = oracle.forward(x, w, **DEPTHWISE.arguments)
    oracle.assert_close(out, expected, 4)


def test_an_exported_program_takes_chunks_of_any_length():
    x, w, _ = DEPTHWISE.random()
    state = random("state", (2, 3, 6), np.float32)

    def compute(x, *state):
        return streaming_conv(x, w, *state, **settings(DEPTHWISE))

    for given in [(), (state,)]:
        like = export.symbolic_args_specs([x, *given], ["b, t, 6", "b, 3, 6"][: 1 + len(given)])
        program = export.export(jax.jit(compute))(*like)
        for length in (1, 3, LENGTH):
            out, last = program.call(x[:, :length], *given)
            before = given[0] if given else np.zeros_like(state)
            whole = np.concatenate([before, x[:, :length]], 1)
            expected = oracle.forward(whole, w, **{**DEPTHWISE.arguments, "padding": [(0, 0)]})
            oracle.assert_close(out, expected, 4)
            np.testing.assert_array_equal(last, whole[:, -3:])


# Sharding.

SHARDED = causal("sharded", (8, 12, 6), (4, 1, 6), 6)
WHOLE = P(None, None, None)


@pytest.mark.parametrize(
    ("chunk", "asked", "expected"),
    [
        pytest.param(
            P("data", None, "group"),
            None,
            (P("data", None, "group"), P("data", None, "group")),
            marks=pytest.mark.slow,
        ),
        # In time the state is whole.
        pytest.param(
            P(None, "data", None), None, (P(None, "data", None), WHOLE), marks=pytest.mark.slow
        ),
        (P("data", "group", None), None, (P("data", "group", None), P("data", None, None))),
        (WHOLE, P("data", None, "group"), (P("data", None, "group"), WHOLE)),
    ],
    ids=str,
)
def test_on_explicit_axes_the_state_comes_to_the_chunk(chunk, asked, expected):
    x, w, y = SHARDED.random()
    state = random("state", (8, 3, 6), np.float32)
    rest: dict[str, Any] = settings(SHARDED)
    mesh = jax.make_mesh((4, 2), ("data", "group"), (AxisType.Explicit,) * 2)

    def compute(x, w, state, y):
        def conv(x, w, state):
            return streaming_conv(x, w, state, **rest, out_sharding=asked)

        (out, last), vjp = jax.vjp(conv, x, w, state)
        return out, last, vjp((y, last))

    with jax.set_mesh(mesh):
        start = streaming_conv_state(8, w, **rest)
        first = jax.device_put(x, chunk)
        results = [
            streaming_conv(first, w, given, **rest, out_sharding=asked) for given in (None, start)
        ]
        for out, last in results:
            assert (jax.typeof(out).sharding.spec, jax.typeof(last).sharding.spec) == expected
        sharded = jax.jit(compute)(first, w, state, jax.device_put(y, expected[0]))
    for out, last in results:
        oracle.assert_close(out, oracle.forward(x, w, **SHARDED.arguments), 4)
        np.testing.assert_array_equal(last, x[:, -3:])
    whole = np.concatenate([state, x], 1)
    arguments = {**SHARDED.arguments, "padding": [(0, 0)]}
    out, dx, dw = oracle.contractions(whole, w, y, **arguments)
    dx[:, -3:] += x[:, -3:]
    out_actual, _, (dx_actual, dw_actual, dstate) = sharded
    oracle.assert_close(out_actual, out, 4)
    oracle.assert_close(np.concatenate([dstate, dx_actual], 1), dx, 8)
    oracle.assert_close(dw_actual, dw, 96)


# Arguments.


def ones(*shape, dtype: Any = np.float32):
    return np.ones(shape, dtype)


WRONG = {
    "a state of another kernel": (
        {"state": ones(2, 2, 6)},
        ValueError,
        ["state", "last inputs", "(2, 3, 6)", "got shape (2, 2, 6)", "x[:, t : t + 1]"],
    ),
    "a chunk without the time": (
        {"lhs": ones(2, 6), "state": ones(2, 3, 6)},
        ValueError,
        ["lhs must have three dimensions", "(2, 6)", "x[:, t : t + 1]"],
    ),
    "a state of another batch": ({"state": ones(1, 3, 6)}, ValueError, ["(2, 3, 6)", "(1, 3, 6)"]),
    "a state of another dtype": (
        {"state": ones(2, 3, 6, dtype=np.float16)},
        TypeError,
        ["lhs and state", "float32", "float16"],
    ),
    "a state that is none": ({"state": "new"}, TypeError, ["state", "array", "str"]),
    "an image": (
        {"lhs": ones(2, 5, 5, 6)},
        ValueError,
        ["lhs", "three dimensions", "(2, 5, 5, 6)"],
    ),
    "a kernel for images": (
        {"rhs": ones(2, 2, 1, 6)},
        ValueError,
        ["rhs", "three", "(2, 2, 1, 6)"],
    ),
    "groups": ({"feature_group_count": 4}, ValueError, ["=4", "lhs (6)", "1, 2, 3, 6"]),
    "a dilation of 0": ({"rhs_dilation": (0,)}, ValueError, ["rhs_dilation", "at least 1"]),
    "two dilations": ({"rhs_dilation": (1, 1)}, ValueError, ["rhs_dilation", "got 2"]),
    "dtypes": ({"rhs": ones(4, 1, 6, dtype=np.float16)}, TypeError, ["lhs and rhs", "float16"]),
    "no taps": ({"rhs": ones(0, 1, 6)}, ValueError, ["at least one tap"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(name):
    wrong, error, parts = WRONG[name]
    good = {"lhs": ones(2, 5, 6), "rhs": ones(4, 1, 6), "feature_group_count": 6}
    with pytest.raises(error) as caught:
        streaming_conv(**{**good, **wrong})
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "error", "part"),
    [
        ({"batch": 2.0}, TypeError, "batch"),
        ({"batch": -1}, ValueError, "batch"),
        ({"feature_group_count": 0}, ValueError, "feature_group_count"),
        ({"rhs": ones(4, 6)}, ValueError, "rhs"),
        ({"rhs": ones(0, 1, 6)}, ValueError, "rhs must have at least one tap"),
        ({"dtype": "foo"}, TypeError, "dtype must be one such as jnp.float32, got 'foo'"),
    ],
)
def test_what_is_wrong_for_a_first_state_is_refused(wrong, error, part):
    with pytest.raises(error, match=part):
        streaming_conv_state(
            **{"batch": 2, "rhs": ones(4, 1, 6), "feature_group_count": 6, **wrong}
        )
