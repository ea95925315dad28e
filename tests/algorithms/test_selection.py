"""The automatic choice: what it is, what it needs of memory and code, what it keeps apart."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_algorithms import CPU
from jaxprs import convolutions

from benchmarks.contenders import by_lax, function, ours
from benchmarks.workloads import MADE, MODES, USED, WORKLOADS, Mode, Workload
from grouped_conv_jax import grouped_conv, implementations, native
from grouped_conv_jax.algorithms import Device, choice
from grouped_conv_jax.algorithms.table import TABLE, unsupported
from grouped_conv_jax.spec import Contraction, ConvSpec

CONTRACTIONS: tuple[Contraction, ...] = ("fprop", "dgrad", "wgrad")
every_workload = pytest.mark.parametrize("name", WORKLOADS)
every_contraction = pytest.mark.parametrize("contraction", CONTRACTIONS)


def arrays(workload: Workload, mode: Mode, dtype="float32") -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(workload.shape(role), dtype) for role in USED[mode]]


def lowered(workload: Workload, mode: Mode, implementation=None, dtype="float32"):
    compute = jax.jit(function(ours(implementation), workload, mode))
    return compute.lower(*arrays(workload, mode, dtype))


def spec_of(workload: Workload, dtype="float32") -> ConvSpec:
    x, w = arrays(workload, "fprop", dtype)
    (equation,) = convolutions(lambda x, w: grouped_conv(x, w, **workload.arguments), x, w)
    return equation.params["spec"]


TPU_ESTIMATES = Path(__file__).parents[2] / "benchmarks" / "tpu-estimates.json"

CHOICES = {
    "alexnet_conv2": ("dense", "dense", "dense"),
    "alexnet_conv4": ("dense", "dense", "dense"),
    "alexnet_conv5": ("dense", "dense", "dense"),
    "resnext_s1": ("taps", "taps", "dense"),
    "resnext_s2_stride2": ("taps", "taps", "dense"),
    "resnext_s3": ("dense", "dense", "dense"),
    "resnext101_32x8d_s1": ("taps", "taps", "dense"),
    "regnetx_w24": ("dense", "dense", "dense"),
    "shufflenet_1x1": ("patches", "patches", "patches"),
    "mobilenet_dw": ("taps", "taps", "taps"),
    "mobilenet_dw_stride2": ("taps", "taps", "taps"),
    "convnext_dw7": ("taps", "taps", "taps"),
}
"""As the docstring of `choose` says: depthwise, narrow, one tap, other groups."""


@pytest.fixture
def no_native_kernels(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "there are none")


@pytest.mark.skipif(native.missing() is not None, reason="there are no native kernels")
@every_workload
def test_the_choice_on_a_cpu_is_native(name):
    spec = spec_of(WORKLOADS[name])
    for contraction in CONTRACTIONS:
        assert choice.choose(contraction, spec, CPU) == "native"


@every_workload
def test_what_is_exported_is_made_of_jax_operations(name):
    spec = spec_of(WORKLOADS[name])
    for contraction in CONTRACTIONS:
        assert choice.choose(contraction, spec, CPU, is_export=True) != "native"


@pytest.mark.usefixtures("no_native_kernels")
@every_workload
def test_the_choice_without_native_kernels_is_what_the_docstring_says(name):
    spec = spec_of(WORKLOADS[name])
    chosen = tuple(choice.choose(contraction, spec, CPU) for contraction in CONTRACTIONS)
    assert chosen == CHOICES[name]


@pytest.mark.parametrize("platform", ["rocm", "another platform"])
@every_workload
def test_where_nothing_has_been_measured_the_choice_is_lax(name, platform):
    spec = spec_of(WORKLOADS[name])
    for contraction, expected in zip(CONTRACTIONS, ("xla", "xla", "lax"), strict=True):
        assert choice.choose(contraction, spec, Device(platform)) == expected


GPU_CHOICES = {
    "alexnet_conv4": ("dense", "dense", "lax"),
    "alexnet_conv5": ("dense", "dense", "lax"),
    "shufflenet_1x1": ("dense", "dense", "lax"),
    "mobilenet_dw_stride2": ("xla", "taps", "lax"),
}


@every_workload
def test_the_choice_on_a_gpu_is_what_the_docstring_says(name):
    spec = spec_of(WORKLOADS[name])
    chosen = tuple(choice.choose(contraction, spec, Device("cuda")) for contraction in CONTRACTIONS)
    assert chosen == GPU_CHOICES.get(name, ("xla", "xla", "lax"))


TPU_CHOICES = {
    "alexnet_conv2": ("xla", "dense", "lax"),
    "alexnet_conv4": ("dense", "dense", "lax"),
    "alexnet_conv5": ("xla", "dense", "lax"),
    "regnetx_w24": ("dense", "dense", "lax"),
    "shufflenet_1x1": ("dense", "dense", "lax"),
}
"""The estimates in docs/tpu_estimates.md are the lowest, or close to it, for these choices."""


@every_workload
def test_the_choice_on_a_tpu_is_what_the_docstring_says(name):
    spec = spec_of(WORKLOADS[name], "bfloat16")
    chosen = tuple(choice.choose(contraction, spec, Device("tpu")) for contraction in CONTRACTIONS)
    assert chosen == TPU_CHOICES.get(name, ("xla", "xla", "lax"))


def test_the_choice_on_a_tpu_is_never_far_behind_the_best_estimate():
    """But for "packed", which spoils neighbouring groups, and must be asked for."""
    results = json.loads(TPU_ESTIMATES.read_text())["results"]
    for name in WORKLOADS:
        for contraction in CONTRACTIONS:
            cycles = {
                result["implementation"]: result["kilocycles"]
                for result in results
                if (result["workload"], result["contraction"]) == (name, contraction)
                and result["implementation"] != "packed"
            }
            spec = spec_of(WORKLOADS[name], "bfloat16")
            chosen = cycles[choice.choose(contraction, spec, Device("tpu"))]
            # Products per tap are better for small batches of large images only, as the page says.
            del cycles["einsum"]
            assert chosen <= 1.6 * min(cycles.values()), (name, contraction)


def test_what_was_no_faster_on_a_gpu_is_left_to_it():
    one_group = spec_of(Workload.of("one group", (2, 8, 8, 64, 64, 3, 2, 1)))
    for contraction in CONTRACTIONS:
        assert choice.choose(contraction, one_group, Device("cuda")) == "xla"
    wide = spec_of(WORKLOADS["alexnet_conv4"], "bfloat16")
    multiplier = spec_of(Workload.of("multiplier", (2, 8, 8, 8, 32, 3, 2, 8)))
    for spec in (wide, multiplier):
        assert choice.choose("dgrad", spec, Device("cuda")) == "xla"


def test_the_gradient_on_a_gpu_is_laxs_own_program():
    """To the letter, so that XLA finds in it what it knows of cuDNN."""
    workload = WORKLOADS["resnext_s3"]
    programs = []
    for conv in (ours(None), by_lax):
        traced = jax.jit(function(conv, workload, "wgrad")).trace(*arrays(workload, "wgrad"))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        programs.append(re.findall(r"stablehlo\.convolution.*", text))
    assert programs[0] == programs[1] != []


@pytest.mark.slow
@pytest.mark.usefixtures("no_native_kernels")
@every_contraction
@every_workload
def test_what_is_chosen_needs_no_more_than_twice_its_arrays(name, contraction):
    workload = WORKLOADS[name]
    memory = lowered(workload, contraction).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 2 * 4 * workload.elements(contraction)


@pytest.mark.usefixtures("no_native_kernels")
def test_the_code_does_not_grow_with_many_groups():
    """Narrow, middling and wide ones."""
    for width in (2, 16, 48):
        for contraction in CONTRACTIONS:
            lines = []
            for groups in (64, 256):
                features = width * groups
                workload = Workload.of("many groups", (2, 8, 8, features, features, 3, 1, groups))
                lines.append(lowered(workload, contraction).as_text().count("\n"))
            assert lines[1] <= lines[0] + 5, (width, contraction)


@pytest.mark.parametrize("name", ["taps", "patches"])
def test_what_would_be_too_much_code_is_refused(name):
    """Large kernels, and strides of many phases."""
    for shape in ((4, 40, 40, 768, 768, 25, 1, 16), (2, 64, 64, 64, 64, 1, 32, 32)):
        spec = spec_of(Workload.of("much", shape))
        assert unsupported(name, "dgrad", spec, CPU) is not None


@pytest.mark.usefixtures("no_native_kernels")
@every_contraction
def test_one_group_is_left_to_xla(contraction):
    for shape in ((8, 28, 28, 1, 16, 5, 1, 1), (2, 14, 14, 64, 64, 3, 1, 1)):
        for dtype in ("float32", "bfloat16", "float16"):
            spec = spec_of(Workload.of("one group", shape), dtype)
            assert choice.choose(contraction, spec, CPU) == "xla"


@pytest.mark.usefixtures("no_native_kernels")
def test_the_code_does_not_grow_without_bound_with_the_kernel():
    for width, groups in ((1, 8), (4, 4)):
        for contraction in CONTRACTIONS:
            lines = []
            for taps in (9, 15):
                shape = (2, 16, 16, width * groups, width * groups, taps, 1, groups)
                lines.append(lowered(Workload.of("taps", shape), contraction).as_text().count("\n"))
            # As the number of taps, at most; from some number on another implementation is chosen.
            assert lines[1] < 2.8 * lines[0], (width, contraction)


SMALL = {
    "depthwise": Workload.of("depthwise", (2, 9, 8, 6, 6, 3, 2, 6)),
    "narrow": Workload.of("narrow", (2, 9, 8, 12, 12, 3, 1, 3)),
    "wide": Workload.of("wide", (2, 9, 8, 64, 64, 3, 2, 2)),
    "one tap": Workload.of("one tap", (2, 9, 8, 32, 32, 1, 1, 2)),
}


@pytest.mark.parametrize(
    "implementation",
    [
        None,
        *(pytest.param(n, marks=pytest.mark.slow) for n in implementations() if n != "packed"),
    ],
)
@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("name", SMALL)
def test_what_is_not_finite_in_a_group_stays_in_it(name, value, implementation):
    """Zeros that keep groups apart by multiplication would not do ("packed" has those)."""
    workload = SMALL[name]
    x, w = (jnp.asarray(workload.random()[role], jnp.float32) for role in ("lhs", "rhs"))
    x = x.at[..., 0].set(value)

    def conv(x, w):
        return grouped_conv(x, w, **workload.arguments, implementation=implementation)

    out, transposed = jax.vjp(conv, x, w)
    dx, dw = transposed(jnp.ones_like(out))
    groups = workload.feature_group_count
    assert not np.isfinite(out[..., : out.shape[-1] // groups]).all()
    assert np.isfinite(out[..., out.shape[-1] // groups :]).all()
    assert np.isfinite(dx).all()
    assert np.isfinite(dw[..., dw.shape[-1] // groups :]).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", SMALL)
def test_the_choice_is_right_in_other_dtypes_too(name, dtype):
    workload = SMALL[name]
    with jax.enable_x64(dtype != "bfloat16"):
        given = {role: jnp.asarray(a, dtype) for role, a in workload.random().items()}
        for mode in MODES:
            results = [
                jax.jit(function(conv, workload, mode))(*(given[role] for role in USED[mode]))
                for conv in (ours(None), by_lax)
            ]
            for role, our, their in zip(MADE[mode], *results, strict=True):
                assert our.dtype == their.dtype == dtype, role
                tolerance = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.06}[dtype]
                our, their = (np.asarray(a).astype(np.float64) for a in (our, their))
                np.testing.assert_allclose(our, their, tolerance, tolerance * np.abs(their).max())


def test_the_expected_times_order_the_choice():
    spec = spec_of(WORKLOADS["regnetx_w24"])
    for contraction in CONTRACTIONS:
        chosen = choice.choose(contraction, spec, CPU)
        expected = {
            name: algorithm.seconds(contraction, spec, CPU) for name, algorithm in TABLE.items()
        }
        assert min(expected, key=expected.__getitem__) == chosen
        assert expected["packed"] == math.inf


def test_a_batch_of_one_example_has_rows_to_add_up():
    """The depthwise kernel gradient adds up examples, or rows if there are not enough of them."""
    for batch in (1, 3, 9, 17):
        workload = dataclasses.replace(SMALL["depthwise"], lhs=(batch, 9, 8, 6))
        given = [jnp.asarray(workload.random()[role], jnp.float32) for role in USED["wgrad"]]
        our, their = (
            jax.jit(function(conv, workload, "wgrad"))(*given)[0] for conv in (ours("taps"), by_lax)
        )
        np.testing.assert_allclose(our, their, 1e-4, 1e-4)
