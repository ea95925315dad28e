"""The convolutions of ONNX, against what its own backend tests expect; many of those are PyTorch's.

The attributes of ONNX's operators are interpreted here, by its specification.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IMPLEMENTATIONS

from grouped_conv_jax import grouped_conv, grouped_conv_transpose
from grouped_conv_jax.operations.streaming import streaming_conv

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
node_tests = importlib.import_module("onnx.backend.test.case.node")
loader = importlib.import_module("onnx.backend.test.loader")

MODULES = ("conv", "convtranspose", "convinteger", "causal_conv_with_state")
KINDS = ("pytorch-converted", "pytorch-operator")


@dataclasses.dataclass(frozen=True, eq=False)
class Golden:
    """One node of an ONNX graph, its inputs (None where one is left out) and expected outputs."""

    name: str
    operator: str
    attributes: dict[str, Any]
    inputs: list[np.ndarray | None]
    outputs: list[np.ndarray]


def goldens() -> list[Golden]:
    found = [golden_of(case.name, case.model.graph, *case.data_sets[0]) for case in node_cases()]
    for case in (case for kind in KINDS for case in loader.load_model_tests(kind=kind)):
        if case.name.startswith(("test_Conv", "test_operator_conv")):
            folder = Path(case.model_dir)
            graph = onnx.load(folder / "model.onnx").graph
            data = folder / "test_data_set_0"
            weights = [onnx.numpy_helper.to_array(w) for w in graph.initializer]
            inputs = [read(data / "input_0.pb"), *weights]
            found.append(golden_of(case.name, graph, inputs, [read(data / "output_0.pb")]))
    return sorted((golden for golden in found if golden), key=lambda golden: golden.name)


def node_cases() -> list[Any]:
    """They collect themselves when they are imported. Older versions of onnx lack the last ones."""
    for name in MODULES:
        if importlib.util.find_spec(f"{node_tests.__name__}.{name}"):
            importlib.import_module(f"{node_tests.__name__}.{name}")
    return [c for c in node_tests._NodeTestCases if c.model.graph.node[0].op_type in OPERATORS]


def golden_of(
    name: str, graph: Any, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
) -> Golden | None:
    """Not of those that are written out in other operators."""
    if len(graph.node) > 1:
        return None
    (node,) = graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    given = iter(inputs)
    present = [next(given) if name else None for name in node.input]
    return Golden(name.removeprefix("test_"), node.op_type, attributes, present, list(outputs))


def read(path: Path) -> np.ndarray:
    return onnx.numpy_helper.to_array(onnx.load_tensor(path))


# The operators.


def layout(rank: int) -> tuple[str, str, str]:
    letters = "DHW"[3 - rank :]
    return f"NC{letters}", f"OI{letters}", f"NC{letters}"


def pads_of(attributes: dict[str, Any], rank: int) -> list[tuple[int, int]]:
    """ONNX has all the beginnings first."""
    pads = attributes.get("pads", [0] * 2 * rank)
    return list(zip(pads[:rank], pads[rank:], strict=True))


def add_bias(out: jax.Array, bias: Any, rank: int) -> jax.Array:
    return out if bias is None else out + bias.reshape(1, -1, *[1] * rank)


def conv(attributes, x, w, bias=None, implementation=None) -> list[jax.Array]:
    rank = x.ndim - 2
    by_name = {b"SAME_UPPER": "SAME", b"SAME_LOWER": "SAME_LOWER", b"VALID": "VALID"}
    out = grouped_conv(
        x,
        w,
        attributes.get("strides", (1,) * rank),
        by_name.get(attributes.get("auto_pad", b"NOTSET")) or pads_of(attributes, rank),
        rhs_dilation=attributes.get("dilations"),
        dimension_numbers=layout(rank),
        feature_group_count=attributes.get("group", 1),
        implementation=implementation,
    )
    return [add_bias(out, bias, rank)]


def conv_transpose(attributes, x, w, bias=None, implementation=None) -> list[jax.Array]:
    """The paddings that ONNX gives are those of the convolution that is transposed."""
    rank = x.ndim - 2
    strides = attributes.get("strides", (1,) * rank)
    dilations = attributes.get("dilations", (1,) * rank)
    more = attributes.get("output_padding", (0,) * rank)
    reach = [(k - 1) * d for k, d in zip(w.shape[2:], dilations, strict=True)]
    pads = pads_of(attributes, rank)
    mode = attributes.get("auto_pad", b"NOTSET")
    shape = attributes.get("output_shape")
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        shape = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if shape is not None:
        totals = [
            s * (n - 1) + m + r + 1 - size
            for s, n, m, r, size in zip(strides, x.shape[2:], more, reach, shape, strict=True)
        ]
        pads = [(total // 2, total - total // 2) for total in totals]
        if mode != b"SAME_UPPER":
            pads = [(high, low) for low, high in pads]
    out = grouped_conv_transpose(
        x,
        w,
        strides,
        [(r - low, r - high) for r, (low, high) in zip(reach, pads, strict=True)],
        rhs_dilation=dilations,
        dimension_numbers=layout(rank),
        feature_group_count=attributes.get("group", 1),
        transpose_kernel=True,
        output_padding=more,
        implementation=implementation,
    )
    return [add_bias(out, bias, rank)]


def conv_integer(
    attributes, x, w, x_zero=None, w_zero=None, implementation=None
) -> list[jax.Array]:
    """What is added around the input is its zero point. The kernel has one for each output."""

    def shifted(array, zero):
        array = array.astype(jnp.int32)
        if zero is None:
            return array
        return array - zero.astype(jnp.int32).reshape(-1, *[1] * (array.ndim - 1))

    return conv(attributes, shifted(x, x_zero), shifted(w, w_zero), implementation=implementation)


def causal_conv_with_state(
    attributes, x, w, bias=None, state=None, implementation=None
) -> list[jax.Array]:
    out, state = streaming_conv(
        x,
        w,
        state,
        dimension_numbers=layout(1),
        feature_group_count=x.shape[1],
        implementation=implementation,
    )
    out = add_bias(out, bias, 1)
    is_silu = attributes.get("activation", b"none") in (b"silu", b"swish")
    return [jax.nn.silu(out) if is_silu else out, state]


OPERATORS: dict[str, Callable[..., list[jax.Array]]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "ConvInteger": conv_integer,
    "CausalConvWithState": causal_conv_with_state,
}

GOLDENS = goldens()
# Groups, a multiplier, strides and output padding.
REPRESENTATIVE = {
    "Conv1d_groups",
    "Conv2d_depthwise_with_multiplier",
    "ConvTranspose2d",
    "convtranspose_group_2",
}


def each_golden(goldens: list[Golden]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("golden", goldens, ids=[golden.name for golden in goldens])


@each_golden(GOLDENS)
def test_the_outputs_are_those_that_onnx_expects(golden):
    check(golden, None)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@each_golden([golden for golden in GOLDENS if golden.name in REPRESENTATIVE])
def test_the_outputs_of_each_implementation_are_those_that_onnx_expects(golden, implementation):
    check(golden, implementation)


def check(golden: Golden, implementation: str | None) -> None:
    compute = OPERATORS[golden.operator]

    @jax.jit
    def outputs(*inputs):
        return compute(golden.attributes, *inputs, implementation=implementation)

    for ours, expected in zip(outputs(*golden.inputs), golden.outputs, strict=True):
        assert ours.dtype == expected.dtype
        # Half a unit of 16 bits, a few of 32 bits, of numbers of any size.
        relative = 1e-3 if ours.dtype == jnp.float16 else 1e-5
        scale = float(np.max(np.abs(expected), initial=0))
        np.testing.assert_allclose(ours, expected, relative, relative * scale)


def test_there_are_goldens_of_all_kinds():
    """So that nothing is passed over if onnx keeps them elsewhere one day."""
    assert {golden.name for golden in GOLDENS} >= REPRESENTATIVE
    by_pytorch = [golden for golden in GOLDENS if golden.name.startswith(("Conv", "operator"))]
    assert len(by_pytorch) >= 30
    assert sum(golden.operator == "ConvTranspose" for golden in GOLDENS) >= 10
    assert any(golden.attributes.get("output_padding") for golden in GOLDENS)
    assert any(golden.attributes.get("output_shape") for golden in GOLDENS)
