"""`jax.export`: forward and gradient, serialized, with a symbolic batch, for other platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, any_implementation, named
from comparison import assert_matches_the_oracle, value_and_gradients
from exported import OPERATIONS, with_gradients
from jax import export

NAMES = ["NCHW", "depthwise, multiplier 2", "both dilated, strided, cropped, three groups"]


@any_implementation
@pytest.mark.parametrize("name", [*NAMES, "two batch groups"])
def test_an_exported_program_computes_the_same(name, implementation):
    (case,) = named(name)
    operands = case.random()
    program = export.export(value_and_gradients(case.conv(implementation)))(*operands)
    assert_matches_the_oracle(program.call(*operands), case, operands)


@any_implementation
def test_a_serialized_program_can_be_differentiated_twice(implementation):
    pytest.importorskip("flatbuffers")
    (case,) = named("NCHW")
    x, w, y = case.random()
    program = export.export(jax.jit(case.conv(implementation)))(x, w)
    loaded = export.deserialize(program.serialize(vjp_order=2))
    assert_matches_the_oracle(value_and_gradients(loaded.call)(x, w, y), case, (x, w, y))

    def second(conv):
        def loss(w):
            return jnp.sum(jnp.sin(conv(x, w)))

        return jax.grad(lambda w: jnp.sum(jax.grad(loss)(w) ** 2))(w)

    length = max(case.lengths) ** 2
    oracle.assert_close(second(loaded.call), np.asarray(second(case.lax_conv())), length)


@any_implementation
def test_a_serialized_gradient_computes_the_same(implementation):
    pytest.importorskip("flatbuffers")
    (case,) = named("depthwise, multiplier 2")
    operands = case.random()
    program = export.export(value_and_gradients(case.conv(implementation)))(*operands)
    loaded = export.deserialize(program.serialize())
    assert_matches_the_oracle(loaded.call(*operands), case, operands)


def with_batch(case: Case, size) -> list[tuple]:
    """The shapes of a case with another batch."""
    layouts = oracle.layouts(len(case.lhs) - 2, **case.arguments)
    lhs, rhs, out = (list(shape) for shape in case.shapes)
    lhs[layouts["lhs"][0]] = out[layouts["out"][0]] = size
    return [tuple(lhs), tuple(rhs), tuple(out)]


@any_implementation
@pytest.mark.parametrize("name", NAMES)
def test_the_batch_can_be_symbolic(name, implementation):
    (case,) = named(name)
    (symbol,) = export.symbolic_shape("b")
    program = export.export(value_and_gradients(case.conv(implementation)))(
        *(jax.ShapeDtypeStruct(shape, np.float32) for shape in with_batch(case, symbol))
    )
    assert symbol in program.out_avals[0].shape
    for size in (1, 5):
        lhs, rhs, _ = with_batch(case, size)
        sized = Case(f"{name}, batch of {size}", lhs, rhs, case.arguments)
        operands = sized.random()
        assert_matches_the_oracle(program.call(*operands), sized, operands)


@any_implementation
def test_the_rows_can_be_symbolic(implementation):
    (case,) = named("kernel 2x4")
    rows, columns = export.symbolic_shape("h, w")
    batch, features = case.lhs[:2]
    lhs = jax.ShapeDtypeStruct((batch, features, rows, columns), np.float32)
    conv = jax.jit(case.conv(implementation))
    program = export.export(conv)(lhs, jax.ShapeDtypeStruct(case.rhs, np.float32))
    assert program.out_avals[0].shape == (batch, case.rhs[0], rows, columns)
    x, w, _ = case.random()
    length = case.lengths[0]
    expected = oracle.forward(x, w, **case.arguments)
    oracle.assert_close(program.call(x, w), expected, length)


@any_implementation
@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "VALID", [(-1, 2), (0, 1)]], ids=str)
@pytest.mark.parametrize("rhs_dilation", [(1, 1), (2, 1)], ids=str)
def test_symbolic_rows_with_strides(implementation, padding, rhs_dilation):
    arguments = {
        "window_strides": (2, 1),
        "padding": padding,
        "rhs_dilation": rhs_dilation,
        "feature_group_count": 2,
    }
    case = Case("symbolic rows", (2, 4, 9, 6), (6, 2, 3, 3), arguments)
    (rows,) = export.symbolic_shape("h", constraints=["h >= 8"])
    lhs = jax.ShapeDtypeStruct((2, 4, rows, 6), np.float32)
    rhs = jax.ShapeDtypeStruct(case.rhs, np.float32)
    x, w, _ = case.random()
    lengths = oracle.lengths(*case.shapes, **arguments)

    conv = case.conv(implementation)
    program = export.export(jax.jit(conv))(lhs, rhs)
    oracle.assert_close(program.call(x, w), oracle.forward(x, w, **arguments), lengths[0])

    gradients = jax.jit(jax.grad(lambda x, w: jnp.sum(conv(x, w)), argnums=(0, 1)))
    dx, dw = export.export(gradients)(lhs, rhs).call(x, w)
    ones = np.ones(case.out)
    oracle.assert_close(dx, oracle.input_gradient(ones, w, x.shape, **arguments), lengths[1])
    oracle.assert_close(dw, oracle.kernel_gradient(x, ones, w.shape, **arguments), lengths[2])


@any_implementation
@pytest.mark.parametrize("batch", ["fixed", "symbolic"])
def test_a_cpu_exports_for_other_platforms(batch, implementation):
    (case,) = named("NCHW")
    operands = case.random()
    size = case.lhs[0] if batch == "fixed" else export.symbolic_shape("b")[0]
    program = export.export(
        value_and_gradients(case.conv(implementation)), platforms=("cuda", "tpu", "cpu")
    )(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in with_batch(case, size)))
    assert program.platforms == ("cuda", "tpu", "cpu")
    assert_matches_the_oracle(program.call(*operands), case, operands)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@any_implementation
def test_there_is_a_lowering_for_each_platform(platform, implementation):
    (case,) = named("NHWC")
    compute = value_and_gradients(case.conv(implementation))
    program = export.export(compute, platforms=(platform,))(*case.random())
    if implementation == "xla" or (implementation is None and platform != "cpu"):
        assert program.mlir_module().count("stablehlo.convolution") == 3


# The relatives of the convolution, each with its gradients.


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_exported_and_compiled_ahead(name):
    pytest.importorskip("flatbuffers")
    operation, arrays = OPERATIONS[name]
    compute = jax.jit(with_gradients(operation))
    (b,) = export.symbolic_shape("b")
    batched = 2 if name == "kernel's gradient" else 1
    shapes = [
        jax.ShapeDtypeStruct((b, *x.shape[1:]) if i < batched else x.shape, x.dtype)
        for i, x in enumerate(arrays)
    ]
    program = export.export(compute, platforms=("cpu", "cuda", "tpu"))(*shapes)
    loaded = export.deserialize(program.serialize())
    ahead = compute.lower(*arrays).compile()
    expected = compute(*arrays)
    for actual in (loaded.call(*arrays), ahead(*arrays)):
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, 1e-4, 1e-4)
