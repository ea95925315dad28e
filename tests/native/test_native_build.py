"""What installing does about the native kernels where they cannot be compiled."""

import shutil
from pathlib import Path

import pytest

from grouped_conv_jax.native import build

SOURCES = Path(build.__file__).parent


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs from a copy of the sources: what is in the wheel, by what the hook says."""
    monkeypatch.delenv("GROUPED_CONV_JAX_NATIVE", raising=False)
    folder = tmp_path / build.FOLDER
    folder.mkdir(parents=True)
    for path in (*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")):
        shutil.copy(path, folder)

    def install() -> dict:
        data: dict = {"artifacts": []}
        build.install(folder, data)
        return data

    return install, folder


def test_a_compiler_that_fails_is_no_error(installed, monkeypatch, capfd):
    install, folder = installed
    monkeypatch.setenv("CXX", "false")
    (folder / build.LIBRARY).write_text("an old one")
    data = install()
    assert data == {"artifacts": ["grouped_conv_jax/native/failure.txt"]}
    assert not (folder / build.LIBRARY).exists()
    assert (
        folder / build.FAILURE
    ).read_text() == "when it was installed, false failed: no error message\n"
    assert "without native kernels: when it was installed, false failed" in capfd.readouterr().err


def test_no_compiler_is_no_error(installed, monkeypatch):
    install, folder = installed
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    install()
    reason = "no C++ compiler was found when it was installed\n"
    assert (folder / build.FAILURE).read_text() == reason


def test_a_compiler_that_is_not_there_is_no_error(installed, monkeypatch):
    install, folder = installed
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    install()
    assert "no-such-compiler did not run" in (folder / build.FAILURE).read_text()


def test_no_headers_are_no_error(installed, monkeypatch):
    install, folder = installed
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    install()
    assert "jaxlib's headers were not found" in (folder / build.FAILURE).read_text()


def test_it_can_be_left_out(installed, monkeypatch):
    install, folder = installed
    monkeypatch.setenv("GROUPED_CONV_JAX_NATIVE", "off")
    install()
    assert "GROUPED_CONV_JAX_NATIVE=off" in (folder / build.FAILURE).read_text()


def test_what_it_cannot_be_is_an_error(installed, monkeypatch):
    monkeypatch.setenv("GROUPED_CONV_JAX_NATIVE", "OFF")
    with pytest.raises(ValueError, match="auto, off or required, got 'OFF'"):
        installed[0]()


def test_it_can_be_required(installed, monkeypatch):
    install, _ = installed
    monkeypatch.setenv("GROUPED_CONV_JAX_NATIVE", "required")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.Failure, match="false failed"):
        install()


COMPILER = """#!/bin/sh
for argument; do case "$argument" in --version) echo 1; exit;; esac; last=$argument; done
echo compiled > "$last"
"""


def test_what_is_there_and_made_of_the_same_is_not_compiled_again(installed, monkeypatch, tmp_path):
    install, folder = installed
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    (folder / build.FAILURE).write_text("of another time")
    data = install()
    assert data["artifacts"] == ["grouped_conv_jax/native/library.so"]
    assert data["pure_python"] is False
    assert data["tag"].startswith("py3-none-")
    assert not (folder / build.FAILURE).exists()
    library = folder / build.LIBRARY
    assert library.read_text() == "compiled\n"
    library.write_text("kept")
    install()
    assert library.read_text() == "kept"
    with (folder / "plan.cc").open("a") as file:
        file.write("// Changed.\n")
    install()
    assert library.read_text() == "compiled\n"
    library.write_text("kept")
    monkeypatch.setenv("CXXFLAGS", "-g")
    install()
    assert library.read_text() == "compiled\n"
