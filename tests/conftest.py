"""Settings for every test: several CPU devices, and no silent change of dtype or rank.

`pytest --platform cuda tests/operations/test_values.py` runs tests on a GPU: those of what is
computed, that do not count devices.
"""

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from compilation import compile_quickly

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--platform", default="cpu", help="of JAX: cpu, cuda, rocm or tpu")

    parser.addoption("--optimized", action="store_true", help="compile as users do")


def pytest_configure(config: pytest.Config) -> None:
    platform = str(config.getoption("--platform"))
    if platform == "cpu" and not config.getoption("--optimized"):
        compile_quickly()
    # The processes that tests start need not look for a TPU only because libtpu is installed.
    os.environ.setdefault("JAX_PLATFORMS", platform)
    # Several workers compile for TPUs that are not there at a time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", platform if platform == "cpu" else f"{platform},cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    if platform != "cpu":
        # The factors of float32 products have fewer bits there unless they are asked for.
        jax.config.update("jax_default_matmul_precision", "highest")


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
def folder(tmp_path) -> Path:
    """Where there are images for the example to train on."""
    from image_folders import save_classes

    save_classes(tmp_path / "images", {"a": 40, "b": 40})
    return tmp_path


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """For the programs that the example compiles, which a module's tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def jax_setting():
    """Changes a setting of JAX for one test: `jax_setting(name, value)`."""
    before = {}

    def change(name: str, value: Any) -> None:
        before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)

    yield change
    for name, value in before.items():
        jax.config.update(name, value)
