"""How the tests compile: quickly, unless they are asked to compile as users do."""

import os

import jax
from compilation import QUICK_FLAGS, optimized


def test_quickly_and_as_users_do(pytestconfig):
    flags = os.environ.get("XLA_FLAGS", "").split()
    quick = not pytestconfig.getoption("--optimized") and jax.default_backend() == "cpu"
    assert [flags.count(flag) for flag in QUICK_FLAGS] == [int(quick)] * len(QUICK_FLAGS)
    assert jax.config.read("jax_disable_most_optimizations") == quick
    # What a test starts to be compiled as users do, in a worker of pytest-xdist, too.
    environment = optimized()
    assert not {*QUICK_FLAGS} & {*environment.get("XLA_FLAGS", "").split()}
    assert "JAX_DISABLE_MOST_OPTIMIZATIONS" not in environment
