"""What `fuzz_arguments` calls: valid calls of the public functions, and what is done to them.

A call is text, so that what is printed of it can be run again: the source of each argument is
evaluated with the names of this module.
"""

import dataclasses
import functools
import inspect
import math
import operator
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx as flax_nnx
from jax import lax  # noqa: F401

import grouped_conv_jax as library
from grouped_conv_jax import Tuning, linen, nnx, towers, weights  # noqa: F401

LARGEST = 2**22
"""Elements of an array that is made; of a larger one there is only the type."""

# What the text of a call is made of, besides jax, jnp, lax, np and the library.


def ones(shape: Any, dtype: str = "float32") -> Any:
    # Sizes of 0 make no exception: XLA takes minutes for an array of 2**31 times 0 elements.
    large = math.prod(max(operator.index(size), 1) for size in shape) > LARGEST
    return jax.ShapeDtypeStruct(shape, dtype) if large else jnp.ones(shape, dtype)


def nested(depth: int) -> list:
    """A list in a list in a list ..."""
    outer: list = []
    for _ in range(depth):
        outer = [outer]
    return outer


def endless() -> list:
    """A list that is its own entry."""
    outer: list = []
    outer.append(outer)
    return outer


def _with_arrays(transform: Callable[[Callable, dict], Any]) -> Callable[[Callable], Callable]:
    """A way to call a function: all its arguments that are arrays, in lists too, are traced."""

    def calling(function: Callable) -> Callable:
        def call(**arguments: Any) -> Any:
            traced = {name: value for name, value in arguments.items() if _is_of_arrays(value)}
            static = {name: value for name, value in arguments.items() if name not in traced}
            return transform(lambda traced: function(**static, **traced), traced)

        return call

    return calling


def _is_of_arrays(value: Any) -> bool:
    if isinstance(value, list) and value:
        return all(isinstance(x, jax.Array | jax.ShapeDtypeStruct) for x in value)
    return isinstance(value, jax.Array | jax.ShapeDtypeStruct)


def _sum(result: Any) -> jax.Array:
    leaves = (leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array))
    return sum((jnp.real(leaf).astype("float32").sum() for leaf in leaves), jnp.float32(0))


def _jitted(function: Callable, traced: dict) -> Any:
    # JAX compiles for types as well, and XLA aborts if they are of more than 64 bits' bytes.
    are_types = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(traced))
    return jax.eval_shape(function, traced) if are_types else jax.jit(function)(traced)


def _in_64_bits(function: Callable, traced: dict) -> Any:
    with jax.enable_x64(True):
        return jax.eval_shape(function, traced)


abstract = _with_arrays(jax.eval_shape)
jitted = _with_arrays(_jitted)
lowered = _with_arrays(lambda function, traced: jax.jit(function).lower(traced))
gradient = _with_arrays(lambda f, traced: jax.grad(lambda traced: _sum(f(traced)))(traced))
abstract_gradient = _with_arrays(
    lambda f, traced: jax.eval_shape(jax.grad(lambda traced: _sum(f(traced))), traced)
)
in_64_bits = _with_arrays(_in_64_bits)
counted = _with_arrays(library.count_flops)
counted_bytes = _with_arrays(library.count_bytes)
mapped = _with_arrays(
    lambda function, traced: jax.eval_shape(
        jax.vmap(function),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), traced),
    )
)

WALKED = ("explain", "used", "tuned", "loaded", "count_parameters", "of_nnx", "of_linen")
"""All arguments of these JAX, Flax or the functions above walk through, as deep as they go."""

WAYS = ("", "jitted", "gradient", *["abstract"] * 5, "lowered")
WAYS += ("abstract_gradient", "in_64_bits", "counted", "counted_bytes", "mapped")


def of_nnx(name: str, inputs: Any, method: str = "__call__", **settings: Any) -> Any:
    """What a layer of nnx gives."""
    layer = getattr(nnx, name)(**settings, rngs=flax_nnx.Rngs(0))
    return getattr(layer, method)(inputs)


def of_linen(name: str, inputs: Any, method: str = "__call__", **settings: Any) -> Any:
    """What a layer of linen gives."""
    layer = getattr(linen, name)(**settings)
    return layer.init_with_output(jax.random.key(0), inputs, method=method)


def loaded(content: Any) -> Any:
    """A tuning from a file, and the same file written again; of None it is a directory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tuning.json")
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(
                content if isinstance(content, bytes) else str(content).encode("utf-8", "replace")
            )
        str(Tuning.load(path))
        Tuning.load(path).save(path)


def tuned(repeats: Any, lhs: Any, rhs: Any) -> Any:
    """Measured times; not as often as it takes hours."""
    if isinstance(repeats, int | np.integer) and repeats > 3:
        return None
    conv = functools.partial(library.grouped_conv, window_strides=(4,), padding="VALID")
    settings: Any = {"repeats": repeats}
    return library.tune(conv, lhs, rhs, **settings)


def used(tuning: Any, **arguments: Any) -> Any:
    return library.explain(**arguments, tuning=tuning)


# Valid calls.

TUNING_FILE = """
{"format": "grouped_conv_jax tuning", "version": 1, "measurements": [{"platform": "cpu",
"device_kind": "cpu", "contraction": "fprop", "spec": "x", "grouped_conv_jax": "0", "jax": "0",
"jaxlib": "1", "seconds": {"xla": 1.0, "vmap": null}}]}
"""

CONV = {"window_strides": "(1, 2)", "padding": "'SAME'", "feature_group_count": "2"}
X, W = "ones((2, 4, 8, 9))", "ones((6, 2, 3, 2))"
LAST = {"dimension_numbers": "('NHWC', 'HWIO', 'NHWC')"}
LINE = {"window_strides": "(1,)", "padding": "[(1, 2)]"}
POINT: dict[str, str] = {"window_strides": "()", "padding": "[]"}
LAYER = {"kernel_size": "(3, 2)", "feature_group_count": "2"}
IN_OUT = {"in_features": "4", "out_features": "6"}
IMAGES, SEQUENCES = "ones((2, 8, 8, 4))", "ones((2, 9, 4))"

CALLS: list[tuple[str, dict[str, str]]] = [
    ("grouped_conv", {"lhs": X, "rhs": W, **CONV}),
    ("grouped_conv", {"lhs": "ones((2, 8, 9, 4))", "rhs": "ones((3, 2, 2, 6))", **CONV, **LAST}),
    ("grouped_conv", {"lhs": "ones((2, 4, 9))", "rhs": "ones((6, 4, 3))", **LINE}),
    (
        "grouped_conv",
        {
            "lhs": "ones((4, 4, 9))",
            "rhs": "ones((6, 4, 3))",
            **LINE,
            "padding": "[('REFLECT', (1, 2))]",
            "batch_group_count": "2",
            "lhs_dilation": "(2,)",
        },
    ),
    (
        "grouped_conv",
        {"lhs": "ones((2, 4))", "rhs": "ones((6, 2))", **POINT, "feature_group_count": "2"},
    ),
    (
        "grouped_conv_transpose",
        {
            "lhs": "ones((2, 8, 8, 4))",
            "rhs": "ones((3, 3, 2, 6))",
            "strides": "(2, 1)",
            "padding": "'SAME'",
            "feature_group_count": "2",
        },
    ),
    (
        "grouped_conv_transpose",
        {
            "lhs": "ones((2, 9, 4))",
            "rhs": "ones((3, 3, 4))",
            "strides": "(2,)",
            "padding": "[(1, 2)]",
            "feature_group_count": "2",
            "transpose_kernel": "True",
            "output_padding": "(1,)",
        },
    ),
    (
        "grouped_conv_input_grad",
        {"lhs_shape": "(2, 4, 8, 9)", "rhs": W, "cotangent": "ones((2, 6, 8, 5))", **CONV},
    ),
    (
        "grouped_conv_kernel_grad",
        {"lhs": X, "rhs_shape": "(6, 2, 3, 2)", "cotangent": "ones((2, 6, 8, 5))", **CONV},
    ),
    (
        "grouped_conv_patches",
        {"lhs": X, "filter_shape": "(3, 2)", "window_strides": "(1, 2)", "padding": "'CAUSAL'"},
    ),
    (
        "grouped_conv_local",
        {"lhs": X, "rhs": "ones((6, 12, 8, 5))", "filter_shape": "(3, 2)", **CONV},
    ),
    (
        "grouped_conv_mixed",
        {
            "lhs": "ones((2, 6, 9))",
            "rhs": "[ones((4, 1, 3)), ones((2, 2, 5))]",
            "window_strides": "(1,)",
            "padding": "'SAME'",
            "group_sizes": "(4, 2)",
            "rhs_dilation": "[(1,), (2,)]",
        },
    ),
    ("streaming_conv", {"lhs": SEQUENCES, "rhs": "ones((3, 2, 6))", "feature_group_count": "2"}),
    (
        "streaming_conv",
        {
            "lhs": SEQUENCES,
            "rhs": "ones((3, 1, 4))",
            "state": "ones((2, 4, 4))",
            "rhs_dilation": "(2,)",
            "feature_group_count": "4",
        },
    ),
    (
        "streaming_conv_state",
        {"batch": "2", "rhs": "ones((3, 1, 4))", "feature_group_count": "4", "dtype": "'float32'"},
    ),
    ("channel_shuffle", {"x": "ones((2, 3, 6))", "feature_group_count": "3", "axis": "-1"}),
    ("explain", {"lhs": X, "rhs": W, **CONV}),
    ("used", {"lhs": X, "rhs": W, **CONV, "tuning": "Tuning()"}),
    ("tuned", {"repeats": "1", "lhs": "ones((1, 1, 8))", "rhs": "ones((1, 1, 3))"}),
    ("loaded", {"content": repr(TUNING_FILE.replace("\n", ""))}),
    ("count_parameters", {"layer_or_tree": "{'params': {'kernel': ones((3, 3, 2, 6))}}"}),
    (
        "weights.convert_kernel",
        {"kernel": "np.ones((8, 2, 3, 3))", "source": "'torch'", "target": "'HWIO'"},
    ),
    (
        "weights.convert_kernel",
        {
            "kernel": "ones((3, 3, 4, 2))",
            "source": "'HWGO'",
            "target": "'transposed ...IO'",
            "feature_group_count": "4",
        },
    ),
    (
        "weights.regroup",
        {"kernel": "np.ones((3, 3, 1, 8))", "feature_group_count": "4", "target_group_count": "2"},
    ),
    ("weights.densify", {"kernel": "ones((1, 8))", "feature_group_count": "4", "layout": "'IO'"}),
    ("weights.split_groups", {"kernel": "np.ones((3, 4, 6))", "feature_group_count": "2"}),
    ("weights.merge_groups", {"kernels": "[np.ones((3, 4, 6)), np.ones((3, 4, 6))]"}),
    ("towers.make_mesh", {"data": "1", "group": "1", "devices": "jax.devices()"}),
    ("of_nnx", {"name": "'GroupedConv'", "inputs": IMAGES, **IN_OUT, **LAYER}),
    ("of_nnx", {"name": "'GroupedConvTranspose'", "inputs": IMAGES, **IN_OUT, **LAYER}),
    (
        "of_nnx",
        {"name": "'GroupedConvLocal'", "inputs": IMAGES, **IN_OUT, **LAYER, "input_size": "(8, 8)"},
    ),
    (
        "of_nnx",
        {"name": "'DepthwiseConv'", "inputs": SEQUENCES, "in_features": "4", "kernel_size": "3"},
    ),
    ("of_nnx", {"name": "'SeparableConv'", "inputs": SEQUENCES, **IN_OUT, "kernel_size": "3"}),
    (
        "of_nnx",
        {"name": "'CausalConv'", "inputs": SEQUENCES, **IN_OUT, **LAYER, "kernel_size": "3"},
    ),
    (
        "of_nnx",
        {
            "name": "'CausalConv'",
            "method": "'initial_state'",
            "inputs": "(2,)",
            **IN_OUT,
            **LAYER,
            "kernel_size": "3",
        },
    ),
    ("of_linen", {"name": "'GroupedConv'", "inputs": IMAGES, "features": "6", **LAYER}),
    ("of_linen", {"name": "'GroupedConvTranspose'", "inputs": IMAGES, "features": "6", **LAYER}),
    ("of_linen", {"name": "'GroupedConvLocal'", "inputs": IMAGES, "features": "6", **LAYER}),
    ("of_linen", {"name": "'DepthwiseConv'", "inputs": SEQUENCES, "kernel_size": "3"}),
    (
        "of_linen",
        {"name": "'SeparableConv'", "inputs": SEQUENCES, "features": "6", "kernel_size": "3"},
    ),
    (
        "of_linen",
        {"name": "'CausalConv'", "inputs": SEQUENCES, "features": "4", "kernel_size": "3"},
    ),
]

FILES = (
    "None",
    "b''",
    "b'\\xff\\xfe\\x00' * 1000",
    "'[' * 100_000",
    "'{\"a\":' * 100_000",
    "'9' * 10_000",
    "'NaN'",
    "'[1e999, -Infinity]'",
    "'\"\\\\ud800\"'",
)

# What is put in place of an argument, or into it.

INTEGERS = (
    "0", "-1", "1", "2", "3", "127", "2**31-1", "2**31", "2**32", "2**62", "2**63-1", "2**63",
    "2**64", "10**30", "10**5000", "-2**63", "True", "1.5", "float('nan')", "float('inf')", "None",
    "np.int8(127)", "np.uint64(2**64-1)", "np.float32(2)", "np.True_", "'a'", "(1,)", "()", "1j",
    "object()",
)  # fmt: skip
SMALL = ("0", "1", "2", "3", "4", "5", "8")
DTYPES = (
    "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int4",
    "int2", "uint2", "uint4", "int8", "uint8", "int32", "int64", "uint64", "bool",
    "complex64", "complex128",
)  # fmt: skip
STRINGS = (
    "''", "'a'", "'SAME'", "'HWIO'", "'OIHW'", "'G'", "'...'", "'transposed '", "'ß'", "'\\0'",
    "'N' * 300", "'İ'", "'\\ud800'", "'ŉHIO'", "b'SAME'",
)  # fmt: skip
OBJECTS = (
    "()", "[]", "{}", "set()", "((1, 1), (1, 1))", "(1,) * 100", "[[1, 2], [3, 4]]", "range(1000)",
    "iter((1, 1))", "'SAME'", "b'ab'", "{1: 2}", "object()", "object", "lambda *a, **k: None",
    "np.ones((2, 2))", "np.ones(())", "np.ones((0,), int)", "np.array([1, 1])", "np.array('SAME')",
    "np.array([None])", "np.ma.masked", "np.float32", "np.datetime64('now')", "ones((1,))",
    "ones((2, 0, 8, 8))", "jnp.array([1, 1])", "ones((2**40, 2**40))", "jax.random.key(0)",
    "jax.ShapeDtypeStruct((2, 4, 8, 9), 'float32')", "jax.P('a')", "jax.P(None, 'a', 'a')",
    "nested(1000)", "nested(100_000)", "endless()", "slice(1)", "Ellipsis", "'x' * 10**5",
    "jax.sharding.SingleDeviceSharding(jax.devices()[0])", "jax.devices()[0]", "Tuning()",
)  # fmt: skip
PLAUSIBLE = {
    "implementation": [repr(name) for name in library.implementations()],
    "precision": ["'highest'", "lax.Precision.HIGH", "('high', 'default')", "'TF32_TF32_F32'"],
    "preferred_element_type": [repr(dtype) for dtype in DTYPES],
    "dtype": [repr(dtype) for dtype in DTYPES],
    "param_dtype": [repr(dtype) for dtype in DTYPES],
    "padding": [
        "'VALID'", "'SAME_LOWER'", "'CAUSAL'", "'CIRCULAR'", "'REFLECT'", "[(1, 2), (0, -3)]",
        "[('REFLECT', (9, 30)), 'SAME']", "[('CIRCULAR', (1, 1)), ('REPLICATE', (-1, 2))]",
        "[[(1, 1), (1, 1)], ['SAME', 'VALID']]", "[(-9, -9), (-9, -9)]", "('REFLECT', (1, 2))",
    ],
    "dimension_numbers": [
        "('NCHW', 'OIHW', 'NHWC')", "('CNHW', 'IOWH', 'HNWC')", "('NHC', 'HIO', 'NHC')",
        "lax.ConvDimensionNumbers((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))",
        "lax.ConvDimensionNumbers((0, 1, 2, 2), (0, 1, 2, 9), None)", "('NCHW', 'OIHW')",
    ],
    "rhs_dilation": ["(2, 1)", "(2,)", "[(1, 1), (2, 2)]"],
    "lhs_dilation": ["(2, 1)", "(2,)"],
    "repeats": ["1", "2"],
    "kernel_dilation": ["2", "(2, 1)"],
    "input_dilation": ["2", "(2, 1)"],
    "strides": ["2", "(2, 1)"],
    "out_sharding": ["None", "jax.P()"],
    "transpose_kernel": ["True", "False"],
    "use_bias": ["True", "False"],
    "mask": ["ones((3, 2, 2, 6))", "ones((3, 2, 2, 6), 'bool')"],
    "content": FILES,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Call:
    """The way, a function's name, and the source of each argument."""

    way: str
    function: str
    arguments: Mapping[str, str]

    def __str__(self) -> str:
        given = ", ".join(f"{name}={source}" for name, source in self.arguments.items())
        return f"{self.way}({self.function})({given})" if self.way else f"{self.function}({given})"

    def prepared(self) -> Callable[[], Any]:
        """What makes the call. The arguments are made here: what fails of that is not the call."""
        function = eval(self.function, NAMES)
        arguments = {name: eval(source, NAMES) for name, source in self.arguments.items()}
        return functools.partial(NAMES[self.way](function) if self.way else function, **arguments)


def random_call(seed: int, largest: float = math.inf) -> Call:
    """A call that is valid but for one to three arguments, without integers beyond `largest`."""
    draw = random.Random(seed)
    function, arguments = draw.choice(CALLS)
    arguments = dict(arguments)
    if draw.random() < 0.2:
        dtype = f", {draw.choice(DTYPES)!r})"
        for name, source in arguments.items():
            arguments[name] = re.sub(r"(ones\(\([\d, ]*\))\)", rf"\1{dtype}", source)
    known = _parameters(function, arguments.get("name", "").strip("'"))
    if draw.random() < 0.3 and (name := draw.choice(known)) in PLAUSIBLE:
        arguments[name] = draw.choice(PLAUSIBLE[name])
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3))):
        name = draw.choice([*arguments, *arguments, *known])
        source = _mutated(draw, name, arguments.get(name, "None"))
        if function in WALKED and re.match("nested|endless", source):
            continue
        if name not in ("name", "method") and not _has_beyond(source, largest):
            arguments[name] = source
    is_traced = function.startswith(("grouped", "streaming_conv", "channel", "of_"))
    return Call(draw.choice(WAYS) if is_traced else "", function, arguments)


def _parameters(function: str, layer: str) -> list[str]:
    """Of a function, or of the layer that it makes."""
    found: list[str] = []
    if function == "of_linen":
        found = [*inspect.signature(getattr(linen, layer)).parameters]
    elif function == "of_nnx":
        made = (getattr(nnx, layer), flax_nnx.Conv)
        found = [name for kind in made for name in inspect.signature(kind.__init__).parameters]
    elif function in ("explain", "used"):
        found = [*inspect.signature(library.grouped_conv).parameters]
    else:
        found = [*inspect.signature(eval(function, NAMES)).parameters]
    # Which layer it is, and which method, is not to be changed; the rest is none of the user's.
    return [n for n in found if n not in ("name", "method", "self", "kwargs", "parent", "rngs")]


def _mutated(draw: random.Random, name: str, source: str) -> str:
    """Another source of an argument: something else, or the same with something else in it."""

    def with_integer() -> str:
        return _replaced(draw, r"(?<![\w.'*])\d+(?![\w.'*])", source, (*INTEGERS, *SMALL * 5))

    kinds = {
        with_integer: 4,
        lambda: draw.choice(PLAUSIBLE[name]) if name in PLAUSIBLE else with_integer(): 4,
        lambda: _replaced(draw, r"'[^']*'", source, STRINGS): 1,
        lambda: draw.choice((*OBJECTS, *INTEGERS, *STRINGS)): 1,
        lambda: _restructured(draw, source): 1,
    }
    (kind,) = draw.choices(list(kinds), list(kinds.values()))
    return kind()


def _replaced(draw: random.Random, pattern: str, source: str, values: Sequence[str]) -> str:
    found = list(re.finditer(pattern, source))
    if not found:
        return draw.choice(values)
    start, end = draw.choice(found).span()
    return source[:start] + draw.choice(values) + source[end:]


def _restructured(draw: random.Random, source: str) -> str:
    forms = ["({},)", "[{}]", "({0}, {0})", "iter({})", "np.array({})", "str({})", "list({})"]
    forms += ["jnp.asarray({})", "[*{}, 1]", "tuple({})[:-1]", "{}[:50]", "{}[::-1]", "[*{}] * 40"]
    return draw.choice(forms).format(source)


def _has_beyond(source: str, largest: float) -> bool:
    """Whether a power in it is larger."""
    powers = re.findall(r"(\d+)\*\*(\d+)", source) if largest < math.inf else []
    return any(int(a) ** int(b) > largest for a, b in powers)


NAMES: dict[str, Any] = {**{name: getattr(library, name) for name in library.__all__}, **globals()}
