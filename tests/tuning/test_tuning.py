"""Measured times: how they are made and kept, and that they change the choice where they should."""

import functools
import pickle
import re
import threading
import time
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import value_and_gradients
from fake_algorithms import algorithm
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import convolutions
from tunings import CASE, CONV, FOR_VMAP, HERE, W, X, Y, automatic, lowered, made_up

from grouped_conv_jax import Tuning, tune
from grouped_conv_jax.algorithms import Algorithm, processor
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.ranking import spec_key
from grouped_conv_jax.algorithms.table import TABLE, unsupported
from grouped_conv_jax.algorithms.xla import Xla
from grouped_conv_jax.spec import ConvSpec
from grouped_conv_jax.towers import make_mesh
from grouped_conv_jax.tuning import tuner
from grouped_conv_jax.tuning.occurrences import occurrences

XLA = Xla()
CONTRACTIONS = ("fprop", "dgrad", "wgrad")


def counted(specs: list[ConvSpec]) -> Algorithm:
    """An algorithm that keeps the specs that it has been lowered for."""

    def computing(contraction: str) -> Callable:
        def compute(first, second, spec):
            specs.append(spec)
            return getattr(XLA, contraction)(first, second, spec)

        return compute

    # To be chosen, but not before it is measured.
    return algorithm(seconds=lambda *_: 1e9, **{c: computing(c) for c in CONTRACTIONS})


# Measuring.


def test_every_implementation_is_measured_for_every_contraction():
    tuning = tune(value_and_gradients(CONV), X, W, Y, repeats=1)
    assert [m.subject.contraction for m in tuning.measurements] == ["dgrad", "fprop", "wgrad"]
    (spec,) = {o.spec for o in occurrences(CONV, (X, W), {})}
    for contraction in CONTRACTIONS:
        seconds = tuning.seconds(contraction, spec, HERE)
        able = {n for n in TABLE if unsupported(n, contraction, spec, HERE) is None}
        # What is the same function by another name is measured once.
        assert set(seconds) == able - ({"lax"} if contraction != "wgrad" else set())
        assert all(time is not None and 0 < time < 10 for time in seconds.values())
    fastest = set()
    for m in tuning.measurements:
        contraction = m.subject.contraction
        fastest |= {(contraction, next(n for n, _ in m.seconds if n != "packed"))}
    with tuning:
        assert lowered(value_and_gradients(CONV), X, W, Y) == fastest


def test_what_is_asked_for_by_name_is_not_measured():
    assert tune(CASE.conv("vmap"), X, W) == Tuning()


def test_a_convolution_inside_anything_is_found():
    @jax.custom_vjp
    def custom(x, w):
        return CONV(x, w)

    custom.defvjp(lambda x, w: (CONV(x, w), (x, w)), lambda r, y: jax.vjp(CONV, *r)[1](y))

    def everything(x, w):
        y = jax.checkpoint(CONV)(x, w) + custom(x, w)
        y += jax.lax.cond(x.sum() > 0, lambda: CONV(2 * x, w), lambda: y)
        y += jax.lax.while_loop(lambda y: y.sum() < 0, lambda y: y + CONV(x, w), y)
        return jax.lax.scan(lambda y, _: (y + CONV(x, w), None), y, length=3)[0]

    times = {o.contraction: o.times for o in occurrences(everything, (X, W), {})}
    assert times == {"fprop": 7}

    def loss(x, w):
        return jnp.sum(jax.checkpoint(CONV)(x, w) * custom(x, w))

    found = occurrences(jax.grad(loss, argnums=(0, 1)), (X, W), {})
    assert {o.contraction for o in found} == set(CONTRACTIONS)


def test_an_implementation_that_fails_is_not_chosen(monkeypatch):
    def refuse(*_):
        raise ValueError("out of luck\nand more")

    monkeypatch.setitem(TABLE, "fails", algorithm(fprop=refuse))
    with pytest.warns(UserWarning, match=r"'fails' fails in fprop of .*: out of luck$") as caught:
        tuning = tune(CONV, X, W, repeats=1)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    (measurement,) = tuning.measurements
    assert measurement.seconds[-1] == ("fails", None)
    assert "failed" in str(tuning)
    with tuning:
        CONV(X, W)


def test_what_is_hopelessly_slow_runs_once_only():
    ran = []

    def run(name):
        return lambda: ran.append(name)

    runs = {name: run(name) for name in ("fast", "slow", "hopeless")}
    first = {"fast": 1e-2, "slow": 1e-1, "hopeless": 1.0, "failed": None}
    medians = tuner._medians(runs, first, repeats=3)
    assert set(medians) == {"fast", "slow"}
    assert ran == ["fast", "slow"] * 3
    assert tuner._first_time(lambda: time.sleep(1e-3), None) < 0.1
    naps = []
    tuner._first_time(lambda: naps.append(time.sleep(0.51)), 1e-3)
    assert len(naps) == 1


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "complex64", "int8"])
@pytest.mark.usefixtures("x64")
def test_the_data_have_the_dtype(dtype):
    (o,) = occurrences(CONV, (X.astype(dtype), W.astype(dtype)), {})
    data = tuner._random(o.spec, "lhs", jax.devices()[0])
    assert data.dtype == dtype
    assert data.shape == X.shape
    assert len(np.unique(np.asarray(data))) > 5


def test_64_bits_are_measured_as_such(monkeypatch):
    specs = []
    monkeypatch.setitem(TABLE, "counted", counted(specs))
    with jax.enable_x64(True):
        (o,) = occurrences(CONV, (X.astype(np.float64), W.astype(np.float64)), {})
    tuner._measure(HERE, "fprop", o.spec, 1)
    assert specs == [o.spec]


def test_there_must_be_a_repetition():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        tune(CONV, X, W, repeats=0)


# The choice.


def test_compiled_functions_notice(monkeypatch):
    specs = []
    monkeypatch.setitem(TABLE, "counted", counted(specs))
    tuning = made_up(CONV, X, W, times={"xla": 2.0, "counted": 1.0})
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=2)
    def conv(x, w):
        return CONV(x, w)

    for run, calls in ((conv, 1), (CONV, 2)):
        expected = run(X, W)
        assert len(specs) == calls - 1
        for _ in range(2):
            with tuning:
                np.testing.assert_allclose(run(X, W), expected, 1e-5, 1e-5)
            assert len(specs) == calls
            run(X, W)
            assert len(specs) == calls


def test_what_was_traced_before_is_not_remembered():
    @jax.custom_vjp
    def custom(x, w):
        return CONV(x, w)

    custom.defvjp(lambda x, w: (CONV(x, w), (x, w)), lambda r, y: jax.vjp(CONV, *r)[1](y))
    compiled, again = jax.jit(CONV), jax.checkpoint(CONV)

    def inside(x, w):
        y = compiled(x, w) + again(x, w) + custom(x, w)
        y = jax.lax.scan(lambda y, _: (y + CONV(x, w), None), y, length=3)[0]
        return jnp.sum(jax.lax.cond(y.sum() > 0, lambda: y, lambda: CONV(x, w)))

    step = jax.grad(inside, argnums=(0, 1))
    expected = automatic(step, X, W)
    tuning = made_up(step, X, W, times=FOR_VMAP)
    for _ in range(2):
        assert lowered(step, X, W) == expected
        with tuning:
            assert lowered(step, X, W) == {(c, "vmap") for c in CONTRACTIONS}


def test_contexts_nest():
    everything = automatic(CONV, X, W)
    outer = made_up(CONV, X, W, times={"vmap": 1.0})
    inner = made_up(CONV, X, W, times={"xla": 1.0})
    with outer:
        with inner, outer, Tuning():
            assert lowered(CONV, X, W) == everything
        with inner:
            assert lowered(CONV, X, W) == {("fprop", "xla")}
            with pytest.raises(KeyError), outer, outer:
                raise KeyError
            assert lowered(CONV, X, W) == {("fprop", "xla")}
        assert lowered(CONV, X, W) == {("fprop", "vmap")}
    assert lowered(CONV, X, W) == everything


def test_a_context_is_of_its_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(lowered(CONV, X, W)))
    with made_up(CONV, X, W, times={"vmap": 1.0}):
        thread.start()
        thread.join()
    assert found == [automatic(CONV, X, W)]


def test_transformations_keep_the_tuning():
    gradients = value_and_gradients(CONV)
    tuning = made_up(gradients, X, W, Y, times=FOR_VMAP)
    expected = {(c, "vmap") for c in CONTRACTIONS}
    with tuning:
        assert lowered(gradients, X, W, Y) == expected
        assert lowered(jax.checkpoint(gradients), X, W, Y) == expected
        # Traced here, and transposed outside.
        _, vjp = jax.vjp(CONV, X, W)
    assert {e.params["choices"] for e in convolutions(vjp, Y)} == {tuning.choices}


def test_mapped_convolutions_have_times_of_their_own():
    mapped = jax.vmap(CONV)
    args = np.stack([X, X]), np.stack([W, W])
    with made_up(CONV, X, W, times=FOR_VMAP):
        assert lowered(mapped, *args) == automatic(mapped, *args)
    with made_up(mapped, *args, times=FOR_VMAP):
        assert lowered(mapped, *args) == {("fprop", "vmap")}
        assert lowered(CONV, X, W) == automatic(CONV, X, W)


def test_other_shapes_and_other_devices_have_no_effect():
    with made_up(CONV, X[:1], W, times=FOR_VMAP):
        assert lowered(CONV, X, W) == automatic(CONV, X, W)
        assert lowered(CONV, X[:1], W) == {("fprop", "vmap")}
    for device in (Device("cpu", "cpu"), Device("tpu", HERE.kind)):
        with made_up(CONV, X, W, times=FOR_VMAP, device=device):
            assert lowered(CONV, X, W) == automatic(CONV, X, W)


def test_a_program_for_other_platforms_is_not_tuned(monkeypatch):
    specs = []
    monkeypatch.setitem(TABLE, "counted", counted(specs))
    with made_up(CONV, X, W, times={"counted": 1.0}):
        for platforms, tuned in (("tpu",), False), (("tpu", "cpu"), False), (("cpu",), True):
            jax.export.export(jax.jit(CONV), platforms=platforms)(X, W)
            assert bool(specs) == tuned


@pytest.mark.parametrize("name", ["xla", "vmap"])
def test_an_implementation_that_is_asked_for_wins(name):
    conv = CASE.conv(name)
    with made_up(CONV, X, W, times={"dense": 1e-3, **FOR_VMAP}):
        assert lowered(conv, X, W) == {("fprop", name)}
        (equation,) = convolutions(conv, X, W)
    assert equation.params["choices"] is None


def test_what_does_not_support_it_is_not_chosen(monkeypatch):
    never = algorithm(supports=lambda *_: "it is Sunday", fprop=XLA.fprop)
    monkeypatch.setitem(TABLE, "never", never)
    times = {"never": 1e-9, "nowhere": 1e-8, "vmap": 1e-3, "xla": 1.0}
    with made_up(CONV, X, W, times=times):
        assert lowered(CONV, X, W) == {("fprop", "vmap")}
    with made_up(CONV, X, W, times={"never": 1e-9, "xla": None}):
        assert lowered(CONV, X, W) == automatic(CONV, X, W)


def test_what_runs_only_where_it_is_asked_for_is_measured_but_not_chosen(monkeypatch):
    shy = algorithm(runs_unasked=False, fprop=functools.partial(XLA.fprop))
    monkeypatch.setitem(TABLE, "shy", shy)
    (measurement,) = tune(CONV, X, W, repeats=1).measurements
    assert "shy" in dict(measurement.seconds)
    with made_up(CONV, X, W, times={"shy": 1e-9, **FOR_VMAP}):
        assert lowered(CONV, X, W) == {("fprop", "vmap")}


# Several devices.


def sharded() -> tuple[jax.Array, jax.Array]:
    """X twice over, on two devices; one group on each of two others."""
    mesh = make_mesh(2, 2)
    x = jax.device_put(np.concatenate([X, X]), NamedSharding(mesh, P("data", None, None, "group")))
    return x, jax.device_put(W, NamedSharding(mesh, P(None, None, None, "group")))


def test_what_one_device_gets_is_tuned(monkeypatch):
    specs = []
    monkeypatch.setitem(TABLE, "counted", counted(specs))
    x, w = sharded()
    step = jax.grad(lambda x, w: jnp.sum(jnp.sin(CONV(x, w))), argnums=(0, 1))
    found = occurrences(step, (x, w), {})
    assert {o.contraction for o in found} == set(CONTRACTIONS)
    assert {o.spec.feature_group_count for o in found} == {1}
    assert {o.spec.lhs_shape for o in found} == {(2, 7, 6, 2)}
    assert specs == []
    conv = jax.jit(CONV)
    expected = conv(x, w)
    with made_up(CONV, x, w, times={"counted": 1.0}):
        np.testing.assert_allclose(conv(x, w), expected, 1e-5, 1e-5)
        local = [spec for spec in specs if spec.lhs_shape == (2, 7, 6, 2)]
        assert len(local) == 1
    with made_up(CONV, np.concatenate([X, X]), W, times={"counted": 1.0}):
        conv(x, w)
        assert [spec for spec in specs if spec.lhs_shape == (2, 7, 6, 2)] == local


def test_a_mesh_in_the_context_does_not_disturb_measurements():
    x, w = sharded()
    with jax.set_mesh(make_mesh(2, 2)):
        (measurement,) = tune(CONV, x, w, repeats=1).measurements
    assert "float32[2,7,6,2]" in measurement.subject.spec


def test_the_work_of_one_device_in_shard_map_is_tuned():
    spread = jax.shard_map(
        CONV, mesh=make_mesh(2, 1), in_specs=(P("data"), P()), out_specs=P("data")
    )
    with made_up(CONV, X[:1], W, times=FOR_VMAP):
        assert lowered(spread, X, W) == {("fprop", "vmap")}
    with made_up(CONV, X, W, times=FOR_VMAP):
        assert lowered(spread, X, W) == automatic(spread, X, W)


def test_the_key_of_the_compilation_cache_tells_choices_apart(monkeypatch):
    x, w = sharded()

    def metadata(*tunings: Tuning) -> str:
        (tuning,) = tunings or (Tuning(),)
        with tuning:
            text = jax.jit(CONV).lower(x, w).as_text()
        (found,) = re.findall(r'grouped_conv = "([^"]*)"', text)
        return found

    one, two = ({"xla": 1.0, "vmap": t} for t in (2.0, 0.5))
    slower = {name: 3 * t for name, t in two.items()}
    keys = [metadata(made_up(CONV, x, w, times=times)) for times in (one, two, slower)]
    assert keys[0] != keys[1] == keys[2]
    assert metadata() not in keys
    # On another processor the same tuning may lead to other choices.
    untuned = metadata()
    monkeypatch.setattr(processor, "name", lambda: "abacus")
    jax.clear_caches()  # Which takes this process for one on a single processor.
    assert metadata(made_up(CONV, x, w, times=one)) not in keys
    assert metadata() == untuned


# A tuning as a value.


def test_of_two_tunings_the_second_wins():
    a = made_up(CONV, X, W, times={"xla": 1.0, "vmap": 2.0})
    b = made_up(CONV, X, W, times={"xla": 3.0, "dense": None})
    c = made_up(CONV, X[:1], W, times={"xla": 1.0})
    (both,) = (a | b).measurements
    assert both.seconds == (("vmap", 2.0), ("xla", 3.0), ("dense", None))
    assert a | c == c | a
    assert len((a | c).measurements) == 2
    assert a | Tuning() == a
    with pytest.raises(TypeError):
        a | {}  # type: ignore[operator]  # That it has the wrong type is what is tested.


def test_equal_tunings_are_one_key():
    a, b = (made_up(CONV, X, W, times=FOR_VMAP) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Tuning()
    assert Tuning().choices is None
    found = pickle.loads(pickle.dumps(a))
    assert found == a
    assert hash(found) == hash(a)


def test_a_tuning_is_a_table():
    tuning = made_up(CONV, X, W, times={"xla": 2e-3, "vmap": 1.5e-3, "dense": None})
    device, heading, line = str(tuning).splitlines()
    assert device == f"{HERE}:"
    assert heading == "contraction  xla ms  vmap ms  dense ms  spec"
    assert line.startswith("fprop         2.000    1.500    failed  float32[2,7,6,4] ")
    other = made_up(CONV, X, W, times={"xla": 1e-3}, device=Device("tpu", "TPU v9"))
    first, second = str(other | tuning).split("\n\n")
    assert first == str(tuning)
    assert second.splitlines()[:2] == ["TPU v9 (tpu):", "contraction  xla ms  spec"]
    assert str(Tuning()) == "No measurements."
    assert repr(tuning) == "<Tuning of 1 contractions>"
    text = str(jax.make_jaxpr(CONV)(X, W))
    with tuning:
        assert len(str(jax.make_jaxpr(CONV)(X, W))) < len(text) + 50


@pytest.mark.parametrize(
    "more",
    [
        {"window_strides": (1, 1)},
        {"padding": [(1, 2), (1, 0)]},
        {"rhs_dilation": (2, 1)},
        {"lhs_dilation": (2, 1)},
        {"precision": "highest"},
        {"preferred_element_type": "float32"},
        {"dimension_numbers": ("NWHC", "HWIO", "NHWC")},
        {"dimension_numbers": ("NHWC", "HWIO", "NWHC")},
    ],
    ids=str,
)
def test_different_specs_have_different_keys(more):
    args = X.astype("bfloat16"), W.astype("bfloat16")
    keys = {spec_key(o.spec) for c in (CONV, CASE.conv(**more)) for o in occurrences(c, args, {})}
    assert len(keys) == 2
