"""Convolutions against PyTorch's, in 64 bits: outputs, gradients, and gradients of gradients."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IMPLEMENTATIONS, random

from grouped_conv_jax import (
    grouped_conv,
    grouped_conv_input_grad,
    grouped_conv_kernel_grad,
    grouped_conv_transpose,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums in the same order each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True, eq=False)
class Conv:
    """A convolution of PyTorch: shapes, and its arguments by their names there.

    The input is (N, features, *spatial); the kernel (outputs, inputs / groups, *taps), or where it
    is a transposed one (inputs, outputs / groups, *taps).
    """

    name: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        return len(self.lhs) - 2

    @property
    def operands(self) -> list[np.ndarray]:
        return [
            random(f"{self.name} {i}", s, np.float64) for i, s in enumerate((self.lhs, self.rhs))
        ]

    def theirs(self) -> Callable[..., Any]:
        """As a function of the input and the kernel."""
        is_transposed = self.output_padding is not None
        name = f"conv_transpose{self.rank}d" if is_transposed else f"conv{self.rank}d"
        more = {"output_padding": self.output_padding} if is_transposed else {}
        function = getattr(torch.nn.functional, name)
        return lambda x, w: function(x, w, **self.arguments, **more)

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def ours(self, implementation: str | None = None) -> Callable[..., Any]:
        if self.output_padding is None:
            return lambda x, w: grouped_conv(
                x, w, implementation=implementation, **self.our_arguments
            )
        reach = [(k - 1) * d for k, d in zip(self.rhs[2:], self.dilation, strict=True)]
        return lambda x, w: grouped_conv_transpose(
            x,
            w,
            self.stride,
            [(r - p, r - p) for r, p in zip(reach, self.padding, strict=True)],
            rhs_dilation=self.dilation,
            dimension_numbers=layout(self.rank),
            feature_group_count=self.groups,
            transpose_kernel=True,
            output_padding=self.output_padding,
            implementation=implementation,
        )

    @property
    def our_arguments(self) -> dict[str, Any]:
        return {
            "window_strides": self.stride,
            "padding": [(p, p) for p in self.padding],
            "rhs_dilation": self.dilation,
            "feature_group_count": self.groups,
        }


def layout(rank: int) -> tuple[str, str, str]:
    letters = "DHW"[3 - rank :]
    return f"NC{letters}", f"OI{letters}", f"NC{letters}"


# name, lhs, rhs, stride, padding, dilation, groups, output_padding of the transposed ones
CONVS = [
    Conv("1d", (2, 4, 9), (6, 2, 3), (2,), (2,), (1,), 2),
    Conv("1d, depthwise, dilated", (2, 3, 10), (6, 1, 3), (1,), (1,), (3,), 3),
    Conv("2d, one group", (2, 3, 6, 5), (4, 3, 3, 2), (1, 2), (1, 0), (1, 1), 1),
    Conv("2d", (2, 6, 7, 6), (9, 2, 3, 2), (2, 1), (2, 1), (1, 3), 3),
    Conv("2d, depthwise", (2, 4, 6, 5), (4, 1, 2, 3), (1, 2), (0, 1), (2, 1), 4),
    # Not with both strides and dilation: XLA:CPU ends the process at some of those in 64 bits.
    Conv("3d", (2, 4, 4, 5, 3), (4, 2, 2, 3, 2), (2, 1, 1), (1, 0, 1), (1, 1, 1), 2),
    Conv("3d, dilated", (2, 4, 4, 5, 3), (4, 2, 2, 3, 2), (1, 1, 1), (1, 0, 1), (1, 2, 1), 2),
]
TRANSPOSED = [
    Conv("1d", (2, 4, 5), (4, 3, 3), (3,), (1,), (2,), 2, (2,)),
    Conv("1d, depthwise", (2, 3, 6), (3, 2, 4), (2,), (0,), (1,), 3, (1,)),
    Conv("2d, one group", (2, 3, 4, 5), (3, 2, 3, 2), (2, 1), (1, 0), (1, 1), 1, (1, 0)),
    Conv("2d", (2, 6, 4, 3), (6, 2, 3, 2), (3, 2), (2, 1), (1, 3), 3, (1, 2)),
    Conv("2d, cropped", (2, 4, 5, 4), (4, 1, 2, 2), (1, 2), (2, 3), (1, 2), 4, (0, 0)),
    Conv("3d", (1, 4, 3, 2, 3), (4, 2, 2, 3, 2), (2, 1, 3), (1, 0, 1), (1, 1, 1), 2, (1, 0, 2)),
]


def each_conv(convs: list[Conv]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("conv", convs, ids=[conv.name for conv in convs])


def assert_same(ours: Any, theirs: Any) -> None:
    for a, e in zip(ours, theirs, strict=True):
        assert a.dtype == np.float64
        np.testing.assert_allclose(a, e.detach().numpy(), 1e-10, 1e-10)


def tensors(*arrays: np.ndarray) -> list[Any]:
    return [torch.from_numpy(a).requires_grad_() for a in arrays]


def check_derivatives(conv: Conv, implementation: str | None) -> None:
    """The output; its gradients, by a cotangent y; and the gradients of those two, by u and v, in
    the input, in the kernel and in y. The third is a convolution as well, the others are not there
    in a function that is linear in each.
    """
    x, w = conv.operands
    theirs = conv.theirs()
    shape = tuple(theirs(*tensors(x, w)).shape)
    y = random(f"{conv.name} y", shape, np.float64)
    u, v = (random(f"{conv.name} {n}", a.shape, np.float64) for n, a in (("u", x), ("v", w)))

    def first(x, w, y):
        out, vjp = jax.vjp(conv.ours(implementation), x, w)
        return vjp(y), out

    @jax.jit
    def all_of_them(x, w, y, u, v):
        gradients, vjp, out = jax.vjp(first, x, w, y, has_aux=True)
        return out, *gradients, *vjp((u, v))

    xt, wt, yt = tensors(x, w, y)
    out = theirs(xt, wt)
    gradients = torch.autograd.grad(out, (xt, wt), yt, create_graph=True)
    second = torch.autograd.grad(gradients, (xt, wt, yt), tensors(u, v))
    assert_same(all_of_them(x, w, y, u, v), (out, *gradients, *second))


@each_conv(CONVS)
def test_values_and_derivatives_are_those_of_pytorch(conv):
    check_derivatives(conv, None)


@each_conv(TRANSPOSED)
def test_values_and_derivatives_of_transposed_ones_are_those_of_pytorch(conv):
    check_derivatives(conv, None)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@each_conv([conv for conv in CONVS + TRANSPOSED if conv.name in ("1d", "2d", "3d")])
def test_each_implementation_has_the_derivatives_of_pytorch(conv, implementation):
    check_derivatives(conv, implementation)


@each_conv(CONVS)
def test_the_gradients_as_operations_are_those_of_pytorch(conv):
    x, w = conv.operands
    xt, wt = tensors(x, w)
    y = random(f"{conv.name} y", tuple(conv.theirs()(xt, wt).shape), np.float64)
    (yt,) = tensors(y)
    theirs = [
        getattr(torch.nn.grad, f"conv{conv.rank}d_{which}")(*operands, **conv.arguments)
        for which, operands in (("input", (x.shape, wt, yt)), ("weight", (xt, w.shape, yt)))
    ]
    ours = (
        grouped_conv_input_grad(x.shape, w, y, **conv.our_arguments),
        grouped_conv_kernel_grad(x, w.shape, y, **conv.our_arguments),
    )
    assert_same(ours, theirs)


# The modes of padding, of PyTorch's layers: (shapes and arguments, what they are here).

MODES = {"circular": "CIRCULAR", "reflect": "REFLECT", "replicate": "REPLICATE"}
PADDED = [
    Conv("1d", (2, 4, 7), (6, 2, 4), (2,), (3,), (1,), 2),
    Conv("2d", (2, 6, 5, 6), (6, 2, 3, 2), (1, 2), (2, 1), (2, 1), 3),
    Conv("3d", (1, 4, 4, 3, 5), (4, 1, 2, 3, 2), (1, 1, 2), (1, 2, 0), (1, 1, 2), 4),
]


def layer(conv: Conv, mode: str, padding: Any, weight: Any) -> Any:
    made = getattr(torch.nn, f"Conv{conv.rank}d")(
        conv.lhs[1],
        conv.rhs[0],
        conv.rhs[2:],
        **{**conv.arguments, "padding": padding},
        bias=False,
        padding_mode=mode,
        dtype=torch.float64,
    )
    made.weight = torch.nn.Parameter(weight)
    return made


@pytest.mark.parametrize("mode", MODES)
@each_conv(PADDED)
def test_padding_modes_are_those_of_pytorch(conv, mode):
    check_padding(conv, mode, conv.padding, [(MODES[mode], (p, p)) for p in conv.padding])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("mode", [*MODES, "zeros"])
@each_conv(PADDED)
def test_padding_to_the_same_size_is_that_of_pytorch(conv, mode):
    conv = dataclasses.replace(conv, stride=(1,) * conv.rank)
    check_padding(conv, mode, "same", MODES.get(mode, "SAME"))


def check_padding(conv: Conv, mode: str, theirs: Any, ours: Any) -> None:
    x, w = conv.operands
    xt, wt = tensors(x, w)
    made = layer(conv, mode, theirs, wt)
    out = made(xt)
    y = random(f"{conv.name} y", tuple(out.shape), np.float64)
    gradients = torch.autograd.grad(out, (xt, made.weight), torch.from_numpy(y))
    arguments = {**conv.our_arguments, "padding": ours}

    @jax.jit
    def value_and_gradients(x, w, y):
        out, vjp = jax.vjp(lambda x, w: grouped_conv(x, w, **arguments), x, w)
        return out, *vjp(y)

    assert_same(value_and_gradients(x, w, y), (out, *gradients))


def test_a_transposed_convolution_undoes_the_shape_of_a_convolution():
    """With the output padding that PyTorch takes for it, for each size of the input."""
    for size in range(5, 9):
        x, w = np.ones((1, 2, size)), np.ones((2, 1, 3))
        arguments = {"stride": 3, "padding": 1, "groups": 2}
        y = torch.nn.functional.conv1d(*tensors(x, w), **arguments)
        more = size - ((y.shape[2] - 1) * 3 - 2 + 3)
        theirs = torch.nn.functional.conv_transpose1d(
            y, *tensors(w), **arguments, output_padding=more
        )
        ours = grouped_conv_transpose(
            jnp.asarray(y.detach().numpy()),
            w,
            (3,),
            [(1, 1)],
            dimension_numbers=layout(1),
            feature_group_count=2,
            transpose_kernel=True,
            output_padding=(more,),
        )
        assert ours.shape == x.shape
        assert_same([ours], [theirs])
