"""The table of implementations: which one runs, when none may, and that work is not repeated."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, every_case, named, representative_cases
from comparison import value_and_gradients
from fake_algorithms import CPU, algorithm
from jaxprs import convolutions

import grouped_conv_jax
from grouped_conv_jax import implementations, native
from grouped_conv_jax.algorithms import Device, choice
from grouped_conv_jax.algorithms.table import TABLE, unsupported
from grouped_conv_jax.algorithms.xla import Xla

CONTRACTIONS = ("fprop", "dgrad", "wgrad")
XLA = Xla()
COMPLETE = [name for name, a in TABLE.items() if all(map(a.has, CONTRACTIONS))]
"""An algorithm may have some contractions only."""

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def test_the_package_offers_the_operation_and_the_names():
    assert {"grouped_conv", "implementations"} <= set(dir(grouped_conv_jax))


@pytest.mark.parametrize("name", COMPLETE)
def test_the_implementation_that_was_asked_for_runs_in_all_contractions(name):
    if name == "native" and native.missing():
        pytest.skip(f"there are no native kernels: {native.missing()}")
    (case,) = named("NCHW")
    lowered = value_and_gradients(case.conv(name)).lower(*case.random())
    text = lowered.as_text(debug_info=True)
    for contraction in CONTRACTIONS:
        assert f"grouped_conv.{contraction}.{name}" in text
        for other in set(implementations()) - {name}:
            assert f"grouped_conv.{contraction}.{other}" not in text


def test_the_automatic_choice_is_made_for_each_contraction():
    (case,) = named("NCHW")
    x, w, _ = operands = case.random()
    text = value_and_gradients(case.conv()).lower(*operands).as_text(debug_info=True)
    (equation,) = convolutions(case.conv(), x, w)
    for contraction in CONTRACTIONS:
        chosen = choice.choose(contraction, equation.params["spec"], CPU)
        for name in implementations():
            assert (f"grouped_conv.{contraction}.{name}" in text) == (name == chosen)


def test_the_second_derivative_keeps_the_implementation():
    (case,) = named("NHWC")
    x, w, _ = case.random()
    for name in COMPLETE:
        conv = case.conv(name)

        def norm(w, conv=conv):
            return jnp.sum(jax.grad(lambda w: jnp.sum(jnp.sin(conv(x, w))))(w) ** 2)

        found = convolutions(jax.vmap(jax.grad(norm)), w[None])
        assert {e.params["implementation"] for e in found} == {name}


@every_case
def test_the_automatic_choice_supports_what_it_is_chosen_for(case):
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in (case.lhs, case.rhs)]
    (equation,) = convolutions(case.conv(), *shapes)
    spec = equation.params["spec"]
    for platform in PLATFORMS:
        for contraction in CONTRACTIONS:
            name = choice.resolve(None, contraction, spec, Device(platform))
            assert unsupported(name, contraction, spec, Device(platform)) is None


def test_the_reference_supports_everything():
    (case,) = named("NCHW")
    (equation,) = convolutions(case.conv(), *case.random()[:2])
    for contraction in CONTRACTIONS:
        for platform in PLATFORMS:
            assert (
                unsupported("xla", contraction, equation.params["spec"], Device(platform)) is None
            )


@pytest.mark.parametrize("name", COMPLETE)
def test_an_implementation_refuses_few_cases(name):
    """A refusal is a skipped test elsewhere, so there must not be many."""
    refused = []
    for case in (case for case in CASES if 0 not in (*case.lhs, *case.rhs, *case.out)):
        shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in (case.lhs, case.rhs)]
        (equation,) = convolutions(case.conv(), *shapes)
        spec = equation.params["spec"]
        if any(unsupported(name, contraction, spec, CPU) for contraction in CONTRACTIONS):
            refused.append(case.name)
    assert len(refused) <= 4, refused


def test_one_entry_in_the_table_adds_an_implementation(monkeypatch):
    calls = []

    def counted(contraction):
        def compute(*arguments):
            calls.append(contraction)
            return getattr(XLA, contraction)(*arguments)

        return compute

    monkeypatch.setitem(TABLE, "counted", algorithm(**{c: counted(c) for c in CONTRACTIONS}))
    assert implementations()[-1] == "counted"
    (case,) = named("NCHW")
    operands = case.random()
    ours = value_and_gradients(case.conv("counted"))(*operands)
    theirs = value_and_gradients(case.conv("xla"))(*operands)
    assert sorted(calls) == ["dgrad", "fprop", "wgrad"]
    for a, e in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, e)


def test_without_its_entry_an_implementation_is_unknown():
    (case,) = named("NCHW")
    with pytest.raises(ValueError, match=r"unknown implementation 'counted'; known: xla, lax"):
        case.conv("counted")(*case.random()[:2])


@pytest.mark.parametrize("how", ["outside jit", "jit", "lower"])
def test_what_an_implementation_does_not_support_is_not_done_by_another(monkeypatch, how):
    def work(*_):
        raise AssertionError("it was not refused")

    functions = dict.fromkeys(CONTRACTIONS, work)
    reason = "the moon is not full"
    monkeypatch.setitem(TABLE, "nothing", algorithm(supports=lambda *_: reason, **functions))
    (case,) = named("NCHW")
    x, w, _ = case.random()
    conv = case.conv("nothing")
    call = {
        "outside jit": lambda: conv(x, w),
        "jit": lambda: jax.jit(conv)(x, w),
        "lower": lambda: jax.jit(conv).lower(x, w),
    }[how]
    with pytest.raises(NotImplementedError) as refusal:
        call()
    for part in ("'nothing'", "fprop", "cpu", reason, "xla, lax"):
        assert part in str(refusal.value)


def test_an_implementation_may_have_the_forward_contraction_only(monkeypatch):
    monkeypatch.setitem(TABLE, "forward", algorithm(fprop=XLA.fprop))
    (case,) = named("NCHW")
    x, w, _ = case.random()
    conv = case.conv("forward")
    np.testing.assert_array_equal(conv(x, w), case.conv("xla")(x, w))
    with pytest.raises(NotImplementedError, match=r"'forward' does not compute this dgrad.*has no"):
        jax.grad(lambda x: jnp.sum(conv(x, w)))(x)


def test_support_may_depend_on_the_platform_and_the_shapes(monkeypatch):
    asked = []

    def supports(contraction, spec, device):
        asked.append((contraction, spec.feature_group_count, device.platform))
        return None if spec.feature_group_count == 2 else "only two groups"

    monkeypatch.setitem(TABLE, "two", algorithm(supports=supports, fprop=XLA.fprop))
    two, three = named("NCHW", "three groups, 6 to 9 features")
    two.conv("two")(*two.random()[:2])
    with pytest.raises(NotImplementedError, match="only two groups"):
        three.conv("two")(*three.random()[:2])
    assert ("fprop", 2, "cpu") in asked
    assert ("fprop", 3, "cpu") in asked


def test_an_implementation_never_sees_an_empty_array(monkeypatch):
    def work(*_):
        raise AssertionError("there is nothing to compute")

    monkeypatch.setitem(TABLE, "never", algorithm(**dict.fromkeys(CONTRACTIONS, work)))
    for name in ("no examples", "no outputs", "no inputs", "kernel larger than the input"):
        (case,) = named(name)
        for result in value_and_gradients(case.conv("never"))(*case.random()):
            assert not np.any(result)


@pytest.mark.parametrize("name", [None, *COMPLETE], ids=str)
def test_the_same_shapes_are_traced_and_compiled_once(name):
    (case,) = named("NHWC")
    x, w, y = case.random()
    # chex counts by the function's name.
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def compute(x, w, y):
        out, vjp = jax.vjp(case.conv(name), x, w)
        return out, *vjp(y)

    for scale in np.arange(1, 4, dtype=np.float32):
        compute(scale * x, w, y)
    assert compute._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_outside_jit_the_same_shapes_are_lowered_once(monkeypatch):
    lowered = []

    def fprop(*arguments):
        lowered.append(arguments)
        return XLA.fprop(*arguments)

    monkeypatch.setitem(TABLE, "once", algorithm(fprop=fprop))
    (case,) = named("NHWC")
    x, w, _ = case.random()
    for scale in np.arange(1, 4, dtype=np.float32):
        case.conv("once")(scale * x, w)
    assert len(lowered) == 1


@pytest.mark.parametrize(
    "unwanted", ["flax", "optax", "chex", "orbax", "tensorflow", "torch", "matplotlib"]
)
def test_importing_the_operation_imports_no_other_framework(unwanted, imported):
    assert unwanted not in imported


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """The top-level modules of a fresh interpreter after the import."""
    program = "import sys, grouped_conv_jax; print(*{name.split('.')[0] for name in sys.modules})"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(ran.stdout.split())


def test_importing_the_operation_starts_no_backend():
    program = (
        "import grouped_conv_jax; from jax._src import xla_bridge;"
        "print(xla_bridge.backends_are_initialized())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "False"


@representative_cases
def test_the_operation_takes_no_more_convolutions_than_lax(case):
    x, w, y = case.random()
    counts = [
        value_and_gradients(conv).lower(x, w, y).as_text().count("stablehlo.convolution")
        for conv in (case.conv("xla"), case.lax_conv())
    ]
    assert counts[0] <= counts[1]
