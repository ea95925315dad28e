"""What hypothesis draws: convolutions are the oracle's, and wrong arguments are refused."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import random
from comparison import value_and_gradients
from drawn import Convolution, Transposed, convolutions

import grouped_conv_jax

hypothesis: Any = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st: Any = pytest.importorskip("hypothesis.strategies")


def examples(count: int, *, derandomize: bool = True) -> Callable[[Any], Any]:
    """The same ones each time, unless told otherwise. A compilation is slow, but nothing hangs."""
    return hypothesis.settings(
        max_examples=count,
        derandomize=derandomize,
        deadline=None,
        database=None,
        phases=[phase for phase in hypothesis.Phase if phase.name != "explain"],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


# Values.


@hypothesis.given(convolutions())
@examples(20)
def test_values_and_gradients_are_those_of_the_oracle(convolution):
    check(convolution, value_and_gradients(convolution))


NO_OUTPUTS = Transposed(
    lhs=(2, 4, 3),
    rhs=(0, 2, 2),
    arguments={
        "strides": (2,),
        "padding": ((1, 1),),
        "rhs_dilation": (1,),
        "dimension_numbers": ("NCH", "OIH", "NCH"),
        "output_padding": (0,),
        "feature_group_count": 2,
    },
    dtype="float32",
    implementation=None,
    taken={},
    pairs=((1, 1),),
)


@hypothesis.example(NO_OUTPUTS)
@hypothesis.given(convolutions(is_transposed=True))
@examples(15)
def test_transposed_ones_are_those_of_the_oracle(convolution):
    check(convolution, value_and_gradients(convolution))


@hypothesis.given(convolutions())
@examples(10)
def test_the_gradients_as_operations_are_those_of_the_oracle(convolution):
    check_gradients(convolution)


@pytest.mark.slow
@hypothesis.given(convolutions())
@examples(100, derandomize=False)
def test_values_and_gradients_of_many_are_those_of_the_oracle(convolution):
    check(convolution, value_and_gradients(convolution))


@pytest.mark.slow
@hypothesis.given(convolutions(is_transposed=True))
@examples(60, derandomize=False)
def test_many_transposed_ones_are_those_of_the_oracle(convolution):
    check(convolution, value_and_gradients(convolution))


@pytest.mark.slow
@hypothesis.given(convolutions())
@examples(40, derandomize=False)
def test_many_gradients_as_operations_are_those_of_the_oracle(convolution):
    check_gradients(convolution)


def check_gradients(convolution: Convolution) -> None:
    @jax.jit
    def compute(x, w, y):
        return convolution(x, w), convolution.input_grad(w, y), convolution.kernel_grad(x, y)

    check(convolution, compute)


def check(convolution: Convolution, compute: Callable[..., Sequence[jax.Array]]) -> None:
    dtype = jnp.dtype(convolution.dtype)
    shapes = convolution.lhs, convolution.rhs, convolution.out
    operands = [random(f"{i} {shape}", shape, dtype) for i, shape in enumerate(shapes)]
    results = ["value", "gradient of lhs", "gradient of rhs"]
    if np.issubdtype(dtype, np.integer):
        # They have no gradients.
        results = results[:1]
        compute = jax.jit(lambda x, w, y: [convolution(x, w)])
    with jax.enable_x64(dtype == np.float64):
        try:
            actual = compute(*operands)
        except NotImplementedError:
            # An implementation that was asked for may refuse; the choice may not.
            hypothesis.assume(convolution.implementation is None)
            raise
    expected = convolution.contractions(*operands)
    lengths = convolution.contractions(*map(np.ones, shapes))
    for i, name in enumerate(results):
        assert actual[i].dtype == dtype
        # What an element gets from all places where it is repeated is summed in its own dtype.
        accumulator = dtype if convolution.taken and name == "gradient of lhs" else None
        length = float(np.max(lengths[i], initial=0))
        oracle.assert_close(actual[i], expected[i], length, accumulator=accumulator, name=name)


# Arguments. Nothing is computed: what is wrong is refused when a call is traced.

LHS, RHS, OUT = (4, 6, 5, 5), (4, 3, 3, 3), (4, 4, 5, 5)
LAYOUT = ("NCHW", "OIHW", "NCHW")
COMMON = {
    "padding": "SAME",
    "rhs_dilation": (1, 1),
    "dimension_numbers": LAYOUT,
    "feature_group_count": 2,
    "precision": None,
    "preferred_element_type": None,
    "implementation": None,
}
CONVOLUTION = {
    **COMMON,
    "window_strides": (1, 1),
    "lhs_dilation": (1, 1),
    "batch_group_count": 1,
    "out_sharding": None,
}


def ones(shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape, np.float32)


# Of each operation: arguments that are right.
CALLS: dict[str, dict[str, Any]] = {
    "grouped_conv": {"lhs": ones(LHS), "rhs": ones(RHS), **CONVOLUTION},
    "grouped_conv_transpose": {
        "lhs": ones(LHS),
        "rhs": ones(RHS),
        **COMMON,
        "strides": (1, 1),
        "transpose_kernel": False,
        "output_padding": (0, 0),
    },
    "grouped_conv_input_grad": {
        "lhs_shape": LHS,
        "rhs": ones(RHS),
        "cotangent": ones(OUT),
        **CONVOLUTION,
    },
    "grouped_conv_kernel_grad": {
        "lhs": ones(LHS),
        "rhs_shape": RHS,
        "cotangent": ones(OUT),
        **CONVOLUTION,
    },
}


def trace(operation: str, arguments: dict[str, Any]) -> Any:
    return jax.eval_shape(lambda: getattr(grouped_conv_jax, operation)(**arguments))


@pytest.mark.parametrize("operation", CALLS)
def test_the_arguments_that_are_changed_here_are_right(operation):
    shapes = {"grouped_conv_input_grad": LHS, "grouped_conv_kernel_grad": RHS}
    assert trace(operation, CALLS[operation]).shape == shapes.get(operation, OUT)


# What is wrong, by the names of arguments.

not_an_integer = st.one_of(
    st.none(), st.text(max_size=3), st.floats(), st.complex_numbers(), st.lists(st.integers())
)
not_positive = st.integers(-(10**20), 0)
not_two_positive = st.one_of(
    st.integers(),
    st.text(),
    st.lists(st.integers(1, 3)).filter(lambda values: len(values) != 2).map(tuple),
    st.tuples(st.integers(1, 3), not_an_integer | not_positive),
    st.tuples(not_an_integer | not_positive, st.integers(1, 3)),
)


def are_two_sizes(value: Any) -> bool:
    is_a_pair = isinstance(value, tuple) and len(value) == 2
    return is_a_pair and all(type(n) is int and n >= 0 for n in value)


def names_a_dtype(text: str) -> bool:
    try:
        np.dtype(text)
    except Exception:
        return False
    return True


not_a_name = st.text().filter(lambda s: s.upper() not in ("SAME", "SAME_LOWER", "VALID", "CAUSAL"))
not_a_pair = st.one_of(
    not_a_name,
    st.none(),
    st.integers(),
    st.lists(st.integers()).filter(lambda values: len(values) != 2),
    st.tuples(st.integers(0, 2), not_an_integer),
    st.tuples(st.just("SAME"), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    st.tuples(st.just("REFLECT"), not_an_integer.filter(lambda value: value is not None)),
    # A crop of more than all.
    st.tuples(st.integers(-100, -6), st.integers(-100, 0)),
)
not_a_count = st.one_of(not_an_integer, not_positive, st.booleans())
not_an_array = st.one_of(
    st.none(),
    st.text(),
    st.integers(),
    st.floats(),
    st.lists(st.integers()),
    st.sampled_from([(), (6,), (4, 6, 5), (4, 5, 3, 3), (4, 6, 5, 5, 1)]).map(ones),
    st.sampled_from([np.float16, np.int32, object]).map(lambda dtype: np.ones(LHS, dtype)),
)
a_shape = st.lists(st.integers(0, 7)).filter(lambda s: tuple(s) not in (LHS, RHS))
not_a_layout = st.one_of(
    st.text(),
    st.integers(),
    st.lists(st.sampled_from(LAYOUT)).filter(lambda s: len(s) != 3),
    st.tuples(st.text(alphabet="NCHWOI", max_size=3), st.just("OIHW"), st.just("NCHW")),
    st.tuples(st.just("NCHW"), st.text(alphabet="NCHW", min_size=4), st.just("NCHW")),
    st.tuples(st.just("NCHW"), st.just("OIHW"), st.sampled_from(["NCHH", "NCXY", "OIHW", 1, None])),
)

WRONG: dict[str, Any] = {
    "lhs": not_an_array,
    "rhs": not_an_array,
    "cotangent": not_an_array,
    "lhs_shape": st.one_of(not_an_integer.filter(lambda v: not isinstance(v, list)), a_shape),
    "rhs_shape": st.one_of(not_an_integer.filter(lambda v: not isinstance(v, list)), a_shape),
    "window_strides": st.none() | not_two_positive,
    "strides": st.none() | not_two_positive,
    "lhs_dilation": not_two_positive,
    "rhs_dilation": not_two_positive,
    "output_padding": not_two_positive.filter(lambda v: not are_two_sizes(v)),
    "padding": st.one_of(
        not_a_name.filter(lambda s: s.upper() not in ("CIRCULAR", "REFLECT", "REPLICATE")),
        st.none(),
        st.integers(),
        st.lists(st.just((1, 1))).filter(lambda values: len(values) != 2),
        st.tuples(st.just((1, 1)), not_a_pair),
        st.tuples(not_a_pair, st.just("VALID")),
    ),
    "dimension_numbers": not_a_layout,
    "feature_group_count": not_a_count | st.sampled_from([1, 3, 4, 5, 6, 7, 2**70]),
    "batch_group_count": not_a_count | st.integers(2, 2**70),
    "precision": st.one_of(st.text(), st.integers(), st.tuples(st.text()), st.just({"high": 1})),
    "preferred_element_type": st.one_of(
        st.text(max_size=4).filter(lambda text: not names_a_dtype(text)),
        st.sampled_from([np.int32, np.float16, object, 3, np.ones(3)]),
    ),
    "implementation": st.one_of(st.text(), st.integers(), st.lists(st.text())),
    "out_sharding": st.one_of(st.text(min_size=1), st.integers(), st.floats()),
    "transpose_kernel": st.one_of(st.none(), st.integers(), st.text(), st.just(ones(()))),
}


def wrong_calls(operations: Sequence[str]) -> Any:
    """The operation, the argument that is wrong, and its value."""

    def of(operation: str) -> Any:
        names = st.sampled_from([n for n in CALLS[operation] if not WRONG[n].is_empty])
        return names.flatmap(lambda name: st.tuples(st.just(name), WRONG[name]))

    return st.sampled_from(operations).flatmap(lambda o: st.tuples(st.just(o), of(o)))


def each_as_an_example(test: Callable[..., None]) -> Callable[..., None]:
    """Those that were not refused so once."""
    for call in (
        ("grouped_conv", ("lhs", 2**31)),
        ("grouped_conv_transpose", ("rhs", -(2**31) - 1)),
        ("grouped_conv_kernel_grad", ("cotangent", 2**31)),
        ("grouped_conv", ("preferred_element_type", ", ")),
        ("grouped_conv_input_grad", ("lhs_shape", (0, 0, 0, 0))),
    ):
        test = hypothesis.example(call)(test)
    return test


@each_as_an_example
@hypothesis.given(wrong_calls(list(CALLS)))
@examples(200)
def test_wrong_arguments_are_refused_with_a_sentence(call):
    check_refusal(*call)


@pytest.mark.slow
@hypothesis.given(wrong_calls(list(CALLS)))
@examples(1500, derandomize=False)
def test_many_wrong_arguments_are_refused_with_a_sentence(call):
    check_refusal(*call)


def check_refusal(operation: str, wrong: tuple[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as refusal:
        trace(operation, CALLS[operation] | dict([wrong]))
    assert str(refusal.value).strip()
