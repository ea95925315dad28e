"""Settings for every test: several CPU devices, and no silent change of dtype or rank."""

from collections.abc import Generator, Iterator

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """An implementation may refuse a case, if it says why: that is a skipped test.

    `test_implementations` sees to it that they do not refuse too much.
    """
    parameters = pyfuncitem.callspec.params if hasattr(pyfuncitem, "callspec") else {}
    name = parameters.get("implementation")
    try:
        return (yield)
    except NotImplementedError as refusal:
        if name and str(refusal).startswith(f"implementation {name!r} does not compute this"):
            pytest.skip(str(refusal))
        raise


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types, for this test only."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """For tests of what is computed, not of the machine code: a fifth of the compilation time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
