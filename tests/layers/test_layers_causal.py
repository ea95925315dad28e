"""`CausalConv` in chunks: the outputs of the whole sequence, however it is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_layers import Layer, as_function, assert_trees_close, randomized

LAYER = Layer("CausalConv", dict(kernel_size=3, kernel_dilation=2), (9,))


def parameters():
    params, apply = as_function(LAYER.nnx())
    return randomized(params), apply


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_chunks(batch):
    params, apply = parameters()
    x, of_linen, made = LAYER.inputs(*batch), LAYER.linen(), LAYER.nnx()
    graphdef, state, rest = nnx.split(made, nnx.Param, ...)

    @jax.jit
    def outputs(params, x):
        nnx.replace_by_pure_dict(state, params)
        layer = nnx.merge(graphdef, state, rest)
        cuts = jnp.split(x, (0, 1, 6), axis=-2)
        carried, linen_carried = layer.initial_state(batch), None
        chunks, linen_chunks = [], []
        for cut in cuts:
            y, carried = layer.stream(cut, carried)
            chunks.append(y)
            y, linen_carried = of_linen.apply(
                {"params": params}, cut, linen_carried, method="stream"
            )
            linen_chunks.append(y)
        together = [jnp.concatenate(ys, axis=-2) for ys in (chunks, linen_chunks)]
        return apply(params, x), *together, carried, linen_carried

    whole, streamed, linen_streamed, carried, linen_carried = outputs(params, x)
    assert_trees_close((streamed, linen_streamed), (whole, whole))
    for state_after in (carried, linen_carried):
        np.testing.assert_array_equal(state_after, x[..., -4:, :])


def test_one_at_a_time_in_a_scan():
    params, apply = parameters()
    x, of_linen = LAYER.inputs(2), LAYER.linen()

    @jax.jit
    def outputs(params, x):
        def step(state, x):
            y, state = of_linen.apply({"params": params}, x[:, None], state, method="stream")
            return state, y[:, 0]

        start = of_linen.initial_state(2, in_features=6)
        return jax.lax.scan(step, start, x.swapaxes(0, 1))[1].swapaxes(0, 1), apply(params, x)

    streamed, whole = outputs(params, x)
    assert_trees_close(streamed, whole)


def test_the_first_call_may_be_of_a_chunk():
    """Parameters are the same whichever method makes them."""
    x, of_linen = LAYER.inputs(2), LAYER.linen()
    by_call = of_linen.init(jax.random.key(0), x)
    by_stream = of_linen.init(jax.random.key(0), x[:, :2], method="stream")
    jax.tree.map(np.testing.assert_array_equal, by_call, by_stream)


def test_the_state_has_the_dtype_of_the_computation():
    for settings in (dict(dtype=jnp.bfloat16), dict(param_dtype=jnp.float32)):
        dtype = settings.get("dtype", jnp.float32)
        layer, of_linen = LAYER.nnx(**settings), LAYER.linen(**settings)
        state = layer.initial_state((2,))
        assert state.shape == (2, 4, 6)
        assert state.dtype == of_linen.initial_state(2, in_features=6).dtype == dtype
        assert jax.eval_shape(layer.stream, LAYER.inputs(2), state)[1].dtype == dtype
        assert layer.initial_state(dtype=jnp.float16).dtype == jnp.float16


@pytest.mark.parametrize(
    ("batch", "state", "error", "message"),
    [
        ((1,), jnp.zeros((1, 3, 6)), ValueError, r"last 4 inputs.*\(1, 4, 6\).*got .*\(1, 3, 6\)"),
        # As many sequences, in other dimensions.
        ((2, 3), jnp.zeros((6, 4, 6)), ValueError, r"state .*\(2, 3, 4, 6\).*got .*\(6, 4, 6\)"),
        ((2,), jnp.zeros((4, 6)), ValueError, r"state .*\(2, 4, 6\).*got .*\(4, 6\)"),
        ((2,), jnp.zeros(()), ValueError, r"state .*\(2, 4, 6\).*got shape \(\)"),
        ((2,), [0.0], TypeError, "state must be an array, got list"),
        (
            (1,),
            jnp.zeros((1, 4, 6), jnp.bfloat16),
            TypeError,
            "inputs and state.*float32.*bfloat16",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(batch, state, error, message):
    x = LAYER.inputs(*batch)
    with pytest.raises(error, match=message):
        LAYER.nnx().stream(x, state)
    with pytest.raises(error, match=message):
        jax.eval_shape(
            lambda key: LAYER.linen().init(key, x, state, method="stream"), jax.random.key(0)
        )


def test_a_chunk_without_its_time_is_refused_where_the_state_tells():
    x, state = LAYER.inputs(2), jnp.zeros((2, 4, 6))
    message = r"time axis\? One element of x is x\[:, t : t \+ 1\]"
    with pytest.raises(ValueError, match=message):
        LAYER.nnx().stream(x[:, 0], state)
    with pytest.raises(ValueError, match=message):
        LAYER.linen().init(jax.random.key(0), x[:, 0], state, method="stream")
    assert LAYER.nnx().stream(x[:, :1], state)[0].shape == (2, 1, 12)


@pytest.mark.parametrize(
    ("batch_shape", "error", "message"),
    [
        ("ab", TypeError, "batch_shape must be a sequence of integers, got 'ab'"),
        (-1, ValueError, r"batch_shape .* at least 0, got \(-1,\)"),
        ((2, -3), ValueError, r"batch_shape .* at least 0, got \(2, -3\)"),
        (2.0, TypeError, r"batch_shape .*2\.0"),
        (True, TypeError, "batch_shape .*True"),
        (np.array([[2, 3]]), TypeError, r"batch_shape .*\(1, 2\)"),
    ],
)
def test_batch_shapes_that_are_none(batch_shape, error, message):
    with pytest.raises(error, match=message):
        LAYER.nnx().initial_state(batch_shape)
    with pytest.raises(error, match=message):
        LAYER.linen().initial_state(batch_shape, in_features=6)


def test_batch_shapes():
    layer = LAYER.nnx()
    for given, batch in ((2, (2,)), (np.int64(2), (2,)), ((), ()), (np.array([2, 3]), (2, 3))):
        assert layer.initial_state(given).shape == (*batch, 4, 6)
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        LAYER.linen().initial_state(2, in_features=0)
