"""Meshes of CPU devices, and convolutions that are compiled and checked on them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import oracle
from cases import CASES, NHWC, Case, named
from comparison import assert_matches_the_oracle, value_and_gradients
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grouped_conv_jax.collectives import Collective, collectives
from grouped_conv_jax.spec import Contraction

CONTRACTIONS: tuple[Contraction, ...] = ("fprop", "dgrad", "wgrad")


def make_mesh(**axes: int) -> Mesh:
    size = int(np.prod(list(axes.values())))
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), kinds, devices=jax.devices()[:size])


MESH = make_mesh(data=4, group=2)


def contraction_of(case: Case, contraction: Contraction, implementation=None) -> Callable:
    """Returns one contraction as a function of (lhs, rhs, out)."""
    return contraction_by(case.conv(implementation), contraction)


def contraction_by(conv: Callable, contraction: Contraction) -> Callable:
    """Returns one contraction of a convolution as a function of (lhs, rhs, out)."""
    return {
        "fprop": lambda x, w, y: conv(x, w),
        "dgrad": lambda x, w, y: jax.vjp(lambda x: conv(x, w), x)[1](y)[0],
        "wgrad": lambda x, w, y: jax.vjp(lambda w: conv(x, w), w)[1](y)[0],
    }[contraction]


def compiled(case: Case, contraction: Contraction, mesh: Mesh, specs, implementation=None):
    """One contraction; operands and results are sharded as `specs` says of lhs, rhs and out."""
    lhs, rhs, out = shardings = [NamedSharding(mesh, spec) for spec in specs]
    operands = [
        jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)
        for shape, sharding in zip(case.shapes, shardings, strict=True)
    ]
    result = {"fprop": out, "dgrad": lhs, "wgrad": rhs}[contraction]
    function = jax.jit(contraction_of(case, contraction, implementation), out_shardings=result)
    return function.lower(*operands).compile()


def sent(case: Case, contraction: Contraction, mesh: Mesh, specs) -> list[Collective]:
    return collectives(compiled(case, contraction, mesh, specs), mesh)


def assert_right(case: Case, mesh: Mesh, specs, implementation=None) -> None:
    """Values and both gradients; the shardings may be such that nothing divides."""
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    compute = value_and_gradients(case.conv(implementation))

    def constrained(*operands):
        operands = map(lax.with_sharding_constraint, operands, shardings)
        lhs, rhs, out = shardings
        return tuple(map(lax.with_sharding_constraint, compute(*operands), (out, lhs, rhs)))

    operands = case.random()
    placed = jax.device_put(operands, NamedSharding(mesh, P()))
    assert_matches_the_oracle(jax.jit(constrained)(*placed), case, operands)


def on_dimensions(case: Case, **axes) -> list[P]:
    """PartitionSpecs of lhs, rhs and out from the axes of "batch" and "features"."""
    specs = []
    for role, layout in oracle.layouts(len(case.lhs) - 2, **case.arguments).items():
        dimensions: list = [None] * len(layout)
        if role == "rhs":
            dimensions[layout[0]] = axes.get("features")
        else:
            dimensions[layout[0]], dimensions[layout[1]] = axes.get("batch"), axes.get("features")
        specs.append(P(*dimensions))
    return specs


def divided(case: Case) -> Case:
    """A case with more examples and groups, so that every mesh divides them."""
    layouts = oracle.layouts(len(case.lhs) - 2, **case.arguments)
    lhs, rhs = list(case.lhs), list(case.rhs)
    lhs[layouts["lhs"][0]] = 8
    lhs[layouts["lhs"][1]] *= 8
    rhs[layouts["rhs"][0]] *= 8
    arguments = {**case.arguments, "feature_group_count": case.groups * 8}
    return dataclasses.replace(
        case,
        name=f"{case.name}, divided",
        lhs=tuple(lhs),
        rhs=tuple(rhs),
        arguments=arguments,
    )


DIVIDED = [
    divided(case)
    for case in CASES
    if 0 not in (*case.lhs, *case.rhs, *case.out)
    and "batch_group_count" not in case.arguments
    and case.name != "cropped to nothing"  # A sum of nothing needs no all-reduce.
]
SOME = [
    divided(case)
    for case in named("rank 1", "NHWC", "both dilated, strided, cropped, three groups")
]

# Mesh, axes of the batch, axes of the features.
SPLITS = {
    "batch": ({"data": 4, "group": 2}, "data", None),
    "groups": ({"data": 4, "group": 2}, None, "group"),
    "both": ({"data": 4, "group": 2}, "data", "group"),
    "both, the other way": ({"data": 2, "group": 4}, "data", "group"),
    "batch over two axes": ({"a": 2, "b": 2, "c": 2}, ("a", "c"), None),
    "groups over two axes": ({"a": 2, "b": 2, "c": 2}, None, ("c", "b")),
    "one group each": ({"data": 1, "group": 8}, None, "group"),
    "one axis": ({"data": 8}, "data", None),
    "six devices": ({"unused": 3, "group": 2}, None, "group"),
    "nothing": ({"data": 4, "group": 2}, None, None),
}


def assert_local(case: Case, split: str, implementation) -> None:
    axes, batch, features = SPLITS[split]
    mesh, specs = make_mesh(**axes), on_dimensions(case, batch=batch, features=features)

    def devices(names) -> int:
        return int(np.prod([mesh.shape[name] for name in listed(names)]))

    for contraction in CONTRACTIONS:
        program = compiled(case, contraction, mesh, specs, implementation)
        found = [(c.kind, c.nbytes, c.axes) for c in collectives(program, mesh)]
        expected, more = [], 0
        if contraction == "wgrad" and batch:
            kernel = int(np.prod(case.rhs)) // devices(features)
            over = tuple(a for a in mesh.axis_names if a in listed(batch))
            expected, more = [("all-reduce", 4 * kernel, over)], kernel
        assert found == expected, contraction
        work = flops(program)
        whole = whole_flops(case, contraction, implementation)
        parts = devices(batch) * devices(features)
        if implementation in ("xla", "vmap"):
            # XLA counts the additions of the all-reduce.
            assert whole / parts <= work <= whole / parts + more, contraction
        elif implementation in ("taps", "patches") and not in_parts(
            case, contraction, implementation
        ):
            # What is looked up depends on the sizes. (The others have loops, which XLA counts
            # once, or pack as many groups as there are.)
            assert work <= 1.5 * whole / parts + more, contraction
    assert_right(case, mesh, specs, implementation)


@functools.cache
def in_parts(case: Case, contraction: Contraction, implementation: str) -> bool:
    """Returns whether one device computes a few examples at a time, in a loop, which XLA counts
    once.
    """
    alone = make_mesh(data=1), (P(),) * 3
    return "while(" in str(compiled(case, contraction, *alone, implementation).as_text())


def listed(names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names or ()


def flops(program) -> float:
    return program.cost_analysis()["flops"]


@functools.cache
def whole_flops(case: Case, contraction: Contraction, implementation) -> float:
    return flops(compiled(case, contraction, make_mesh(data=1), (P(),) * 3, implementation))


def dense(name: str, lhs, rhs, groups: int = 1, **more) -> Case:
    arguments = {
        "window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC,
        "feature_group_count": groups, **more,
    }  # fmt: skip
    return Case(name, lhs, rhs, arguments)


def resized(case: Case, draw: np.random.Generator) -> Case:
    layout = oracle.layouts(len(case.lhs) - 2, **case.arguments)["lhs"]
    lhs = list(case.lhs)
    lhs[layout[0]] = int(draw.integers(1, 9))
    for d in layout[2:]:
        lhs[d] += int(draw.integers(0, 8))
    return Case(case.name, tuple(lhs), case.rhs, case.arguments)


def random_spec(shape, mesh: Mesh, draw: np.random.Generator) -> P:
    dimensions: list[tuple[str, ...]] = [()] * len(shape)
    for axis in draw.permutation(mesh.axis_names):
        at = draw.integers(len(shape))
        parts = np.prod([mesh.shape[a] for a in (*dimensions[at], axis)])
        if draw.random() < 0.7 and shape[at] >= parts:
            dimensions[at] += (str(axis),)
    return P(*dimensions)
