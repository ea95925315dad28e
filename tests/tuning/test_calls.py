"""Calls that `explain` and `tune` trace: what users write, and that none of it is changed."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from grouped_conv_jax import explain, grouped_conv, linen, tune
from grouped_conv_jax.nnx import GroupedConv

LAYOUT = ("NHWC", "HWIO", "NHWC")
ARGUMENTS = {"dimension_numbers": LAYOUT, "feature_group_count": 4}
X, W = jnp.ones((2, 6, 6, 8)), jnp.ones((3, 3, 2, 8))


@pytest.fixture(autouse=True)
def usual_promotion() -> Iterator[None]:
    """The libraries that are called here mix dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def conv(x: Any, w: Any, stride: int = 1) -> jax.Array:
    return grouped_conv(x, w, (stride, stride), "SAME", **ARGUMENTS)


def loss(w: Any, x: Any) -> jax.Array:
    return jnp.mean(conv(x, w) ** 2)


def contractions(*args: Any, **kwargs: Any) -> dict[str, int]:
    """How often each contraction is computed."""
    found: dict[str, int] = {}
    for row in explain(*args, **kwargs).rows:
        if row.is_chosen:
            found[row.contraction] = found.get(row.contraction, 0) + row.times
    return found


STEP = {"fprop": 1, "wgrad": 1}


# One rule for both.


def test_tune_takes_the_arguments_of_a_convolution():
    for args, named in (
        ((X, W, (1, 1), "SAME"), ARGUMENTS),
        ((X, W), {"window_strides": (1, 1), "padding": "SAME", **ARGUMENTS}),
    ):
        measured = {m.subject.contraction for m in tune(*args, **named, repeats=1).measurements}
        explained = {row.contraction for row in explain(*args, **named).rows}
        assert measured == explained == {"fprop", "dgrad", "wgrad"}
    (measurement,) = tune(
        X.astype("int8"), W.astype("int8"), (1, 1), "SAME", **ARGUMENTS, repeats=1
    ).measurements
    assert measurement.subject.contraction == "fprop"


@pytest.mark.parametrize("look", [explain, tune])
def test_both_refuse_the_same(look):
    with pytest.raises(TypeError, match="lhs must be an array, got list"):
        look([1.0], W, (1, 1), "SAME")
    with pytest.raises(TypeError, match="padding"):
        look(X, W, (1, 1))
    with pytest.raises(ValueError, match="does not divide"):
        look(X, W, (1, 1), "SAME", feature_group_count=5)


# Flax nnx.


class Net(nnx.Module):
    """A layer with statistics, random numbers and a count of calls."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = GroupedConv(8, 8, (3, 3), feature_group_count=4, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x: Any) -> jax.Array:
        self.calls[...] += 1
        return self.dropout(self.norm(self.conv(x)))

    def step(self, optimizer: nnx.Optimizer, x: Any) -> jax.Array:
        return step(self, optimizer, None, x)


def step(net, optimizer, metrics, x, is_update=True, name="sum", function=jnp.mean, scale=1e-3):
    assert name == "sum"
    value, grads = nnx.value_and_grad(lambda net: function(net(x) ** 2) * scale)(net)
    if is_update:
        optimizer.update(net, grads)
    if metrics is not None:
        metrics.update(values=value)
    return value


class Training(nnx.Module):
    """A module and the optimizer of its parameters in one."""

    def __init__(self, net: Net):
        self.net = net
        self.optimizer = nnx.Optimizer(net, optax.sgd(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(self, x: Any) -> jax.Array:
        return step(self.net, self.optimizer, None, x)


def nnx_objects() -> tuple[Net, nnx.Optimizer, nnx.MultiMetric]:
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)
    return net, optimizer, nnx.MultiMetric(loss=nnx.metrics.Average())


def values(objects: Any) -> list[np.ndarray]:
    """The values of all arrays, which tracers do not have."""
    leaves = [x for x in jax.tree.leaves(objects) if isinstance(x, jax.Array)]
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [
        np.asarray(jax.random.key_data(x) if is_key else x)
        for x, is_key in zip(leaves, keys, strict=True)
    ]


STATIC = ("is_update", "name", "function")


@pytest.mark.parametrize("look", [explain, functools.partial(tune, repeats=1)])
@pytest.mark.parametrize("form", ["plain", "named", "jit", "method", "partial", "one object"])
def test_a_step_of_nnx_is_whole_and_changes_nothing(form, look):
    objects = net, optimizer, _ = nnx_objects()
    training = Training(net)
    before = values((objects, training))
    call: dict[str, tuple[Callable, tuple, dict]] = {
        "plain": (step, (*objects, X), {}),
        "named": (step, objects, {"x": X, "function": jnp.sum, "scale": np.float32(2)}),
        "jit": (nnx.jit(step, static_argnames=STATIC), (*objects, X), {"name": "sum"}),
        "method": (net.step, (optimizer, X), {}),
        "partial": (functools.partial(step, *objects, scale=2.0), (X,), {}),
        "one object": (training.step, (X,), {}),
    }
    function, args, kwargs = call[form]
    found = look(function, *args, **kwargs)
    if look is explain:
        assert {(row.contraction, row.times) for row in found.rows} == set(STEP.items())
    else:
        assert {m.subject.contraction for m in found.measurements} == set(STEP)
    after = values((objects, training))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    function(*args, **kwargs)  # Nothing of the trace is left to break it.
    assert net.calls[...] == 1


def test_a_module_is_a_function():
    net, *_ = nnx_objects()
    assert contractions(net, X) == {"fprop": 1}
    assert net.calls[...] == 0


def test_shapes_of_modules_are_enough():
    net, optimizer, _ = nnx.eval_shape(nnx_objects)
    assert contractions(step, net, optimizer, None, jax.ShapeDtypeStruct(X.shape, X.dtype)) == STEP


def test_a_module_that_two_arguments_share_is_one():
    net, *_ = nnx_objects()

    def function(net, training, x):
        net.calls[...] += 1
        # The branch depends on a value that is known only if both are one object.
        assert training.net is net
        return training.net.conv(x) * training.net.calls[...]

    assert contractions(function, net, Training(net), X) == {"fprop": 1}


def test_a_module_that_is_no_tree():
    class Opaque(Net, pytree=False):
        pass

    net = Opaque(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)
    before = values(nnx.state(net))
    for function in (step, nnx.jit(step)):
        assert contractions(function, net, optimizer, None, X) == STEP
    assert contractions(net, X) == {"fprop": 1}
    for a, b in zip(before, values(nnx.state(net)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_split_modules_and_random_numbers():
    net, *_ = nnx_objects()
    graph, state = nnx.split(net)
    split = jax.jit(lambda graph, state, x: nnx.merge(graph, state)(x), static_argnums=0)
    assert contractions(split, graph, state, X) == {"fprop": 1}
    drawn = lambda rngs, x: conv(x, rngs.normal(W.shape))  # noqa: E731
    rngs = nnx.Rngs(0)
    assert contractions(drawn, rngs, X) == {"fprop": 1}
    assert rngs.default.count[...] == 0


def test_a_function_may_return_anything():
    net, *_ = nnx_objects()
    assert contractions(lambda net, x: (net, net(x), "text", None, jnp.sin), net, X) == {"fprop": 1}


# Others.


def test_a_train_state():
    layer = linen.GroupedConv(8, (3, 3), feature_group_count=4)
    variables = layer.init(jax.random.key(0), X)
    assert contractions(layer.apply, variables, X) == {"fprop": 1}
    state = TrainState.create(apply_fn=layer.apply, params=variables["params"], tx=optax.adam(1e-3))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x):
        def loss(params):
            return jnp.mean(state.apply_fn({"params": params}, x) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    assert contractions(step, state, X) == STEP
    step(state, X)  # It was not donated before.


def test_equinox():
    eqx = pytest.importorskip("equinox")

    class Module(eqx.Module):
        w: jax.Array
        activation: Callable
        norm: Any
        name: str = eqx.field(static=True)

        def __call__(self, x, state):
            y = self.activation(conv(x, self.w))
            norm = jax.vmap(self.norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            return norm(y.reshape(-1, 8), state)

        def loss(self, x):
            return loss(self.w, x)

    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(8, axis_name="batch", mode="batch")
    module = Module(W, jax.nn.relu, norm, "name")

    def step(module, state, x):
        def loss(module, state):
            y, state = module(x, state)
            return jnp.mean(y**2), state

        (_, state), grads = eqx.filter_value_and_grad(loss, has_aux=True)(module, state)
        return eqx.apply_updates(module, grads), state

    for function in (step, eqx.filter_jit(step), eqx.filter_jit(step, donate="all")):
        assert contractions(function, module, state, X) == STEP
    assert contractions(module, X, state) == {"fprop": 1}
    assert contractions(module.loss, X) == {"fprop": 1}
    assert contractions(eqx.filter_jit(eqx.filter_grad(Module.loss)), module, X) == STEP
    step(module, state, X)  # The state is not used up.


def test_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x):
        return conv(x, hk.get_parameter("w", W.shape, init=jnp.ones))

    net = hk.transform(forward)
    params = net.init(None, X)
    assert contractions(net.apply, params, None, X) == {"fprop": 1}
    grad = jax.jit(jax.grad(lambda params, key, x: jnp.mean(net.apply(params, key, x) ** 2)))
    assert contractions(grad, params, jax.random.key(0), X) == STEP


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """A tree with a static field."""

    w: jax.Array
    stride: int = dataclasses.field(metadata={"static": True})


def test_dataclasses_keys_and_static_arguments():
    strided = jax.jit(lambda state, x: conv(x, state.w, state.stride))
    assert contractions(strided, State(W, 2), X) == {"fprop": 1}
    drawn = jax.jit(lambda key, x: conv(x, jax.random.normal(key, W.shape)))
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        assert contractions(drawn, key, X) == {"fprop": 1}
    static = jax.jit(conv, static_argnums=2)
    assert contractions(static, X, W, 2) == {"fprop": 1}
    assert contractions(static, X, W, np.int64(2)) == {"fprop": 1}


def test_what_a_function_writes_into_containers_and_references():
    def function(tree, x):
        tree["y"] = conv(x, tree["w"])
        tree["list"].append(conv(2 * x, tree["w"]))

    tree = {"w": W, "list": []}
    assert contractions(function, tree, X) == {"fprop": 2}
    assert list(tree) == ["w", "list"]
    assert tree["list"] == []

    def step(reference, x):
        reference[...] -= jax.grad(loss)(reference[...], x)

    reference = jax.new_ref(W)
    for write in (step, jax.jit(step)):
        assert contractions(write, reference, X) == STEP
    np.testing.assert_array_equal(reference[...], W)


# What cannot be traced.


def test_modules_that_are_not_arguments_are_refused():
    objects = nnx_objects()
    before = values(objects)
    for function in (lambda x: step(*objects, x), lambda x: objects[0](x)):
        with pytest.raises(
            ValueError, match="module of Flax that is not among its arguments; pass"
        ):
            explain(function, X)
    for a, b in zip(before, values(objects), strict=True):
        np.testing.assert_array_equal(a, b)
