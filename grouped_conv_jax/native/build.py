"""Compiles the kernels when the package is installed or a wheel is made of it.

This is a hook of the build backend (see pyproject.toml), which runs it without the package. If it
cannot compile, it notes why, and what is installed works without the kernels. The environment
variable `GROUPED_CONV_JAX_NATIVE` is `off` for no kernels, `required` for an error if there can be
none; `CXX` and `CXXFLAGS` are the compiler and more flags for it. As a program it compiles them
into its folder.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
else:
    try:
        from hatchling.builders.hooks.plugin.interface import BuildHookInterface
    except ImportError:  # Tests and the fuzzer compile without the build backend.
        BuildHookInterface = object

FOLDER = Path("grouped_conv_jax", "native")
LIBRARY, FAILURE, KEY = "library.so", "failure.txt", "library.key"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma")
BASELINE = ("-march=x86-64",)
"""Whatever CXXFLAGS say: what is compiled for more is asked for only where the processor has it."""

INSTRUCTION_SETS = {
    "avx512": (*BASELINE, *AVX512),
    "avx512_bf16": (*BASELINE, *AVX512, "-mavx512bf16", "-DGROUPED_CONV_PAIRS"),
    "amx_bf16": (*BASELINE, *AVX512, "-mamx-tile", "-mamx-bf16", "-DGROUPED_CONV_AMX"),
    "avx2": (*BASELINE, "-mavx2", "-mfma"),
    "portable": BASELINE,
}
X86 = ("x86_64", "amd64")


class Failure(Exception):
    """Why the kernels cannot be compiled."""


class Hook(BuildHookInterface):
    """Adds the library to an installation or a wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name == "wheel":
            install(Path(self.root, FOLDER), build_data)


def install(folder: Path, build_data: dict[str, Any]) -> None:
    """Compiles the library, or notes why not, and says what is to be in the wheel.

    Raises:
      Failure: it is required, and cannot be compiled.
      ValueError: GROUPED_CONV_JAX_NATIVE is something else than it can be.
    """
    wanted = os.environ.get("GROUPED_CONV_JAX_NATIVE", "auto")
    if wanted not in ("auto", "off", "required"):
        raise ValueError(f"GROUPED_CONV_JAX_NATIVE is auto, off or required, got {wanted!r}")
    try:
        if wanted == "off":
            raise Failure("GROUPED_CONV_JAX_NATIVE=off when it was installed")
        compile_library(folder)
    except Failure as failure:
        if wanted == "required":
            raise
        print(f"grouped_conv_jax without native kernels: {failure}", file=sys.stderr)
        # Where nothing can be written there is no note, and none is needed to go on.
        with contextlib.suppress(OSError):
            for name in (LIBRARY, KEY):
                (folder / name).unlink(missing_ok=True)
            (folder / FAILURE).write_text(f"{failure}\n")
            build_data["artifacts"].append(f"{FOLDER.as_posix()}/{FAILURE}")
    else:
        (folder / FAILURE).unlink(missing_ok=True)
        build_data["artifacts"].append(f"{FOLDER.as_posix()}/{LIBRARY}")
        build_data["pure_python"] = False
        # It knows nothing of Python: one wheel for all versions.
        machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{machine}"


@dataclasses.dataclass(frozen=True)
class Unit:
    """One call of the compiler: a source and what it is compiled for."""

    source: Path
    name: str
    flags: tuple[str, ...]


def compile_library(folder: Path) -> None:
    """Makes the library, unless it is there and made of the same.

    Raises:
      Failure: it cannot be made.
    """
    compiler, include = find_compiler(), find_headers()
    units = kernels(folder)
    baseline = units[-1].flags
    units.append(Unit(folder / "handler.cc", "handler", (*baseline, "-isystem", str(include))))
    flags = (*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")))
    key = key_of(folder, compiler, flags, include)
    if (folder / LIBRARY).exists() and _text(folder / KEY) == key:
        return
    # In one step, so that a process that has the old one loaded keeps it.
    made = folder / f"{LIBRARY}.{os.getpid()}"
    try:
        link(compiler, flags, units, made)
        made.replace(folder / LIBRARY)
        (folder / KEY).write_text(key)
    except OSError as error:
        raise Failure(f"the compiled library could not be written: {error}") from error
    finally:
        made.unlink(missing_ok=True)


def kernels(folder: Path) -> list[Unit]:
    """Everything but the call from XLA."""
    is_x86 = platform.machine().lower() in X86
    sets = INSTRUCTION_SETS if is_x86 else {"portable": ()}
    flags = (*BASELINE, "-DGROUPED_CONV_X86") if is_x86 else ()
    return [
        *(
            Unit(folder / "kernel_table.cc", name, (f"-DINSTRUCTION_SET={name}", *more))
            for name, more in sets.items()
        ),
        *(
            Unit(folder / f"{name}.cc", name, flags)
            for name in ("phases", "plan", "instruction_sets")
        ),
    ]


def link(compiler: list[str], flags: tuple[str, ...], units: list[Unit], target: Path) -> None:
    """Compiles all, as many at a time as there are cores, and makes one library of them."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):

        def compiled(unit: Unit) -> str:
            made = str(Path(scratch, f"{unit.name}.o"))
            run([*compiler, *flags, *unit.flags, "-c", str(unit.source), "-o", made])
            return made

        objects = list(pool.map(compiled, units))
        run([*compiler, *flags, "-shared", *objects, "-pthread", "-o", str(target)])


def find_compiler() -> list[str]:
    """The words of its command."""
    if sys.platform == "win32":
        raise Failure("the kernels are not compiled on Windows")
    if own := os.environ.get("CXX"):
        return shlex.split(own)
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise Failure("no C++ compiler was found when it was installed")


def find_headers() -> Path:
    """The folder of XLA's headers, which jaxlib ships."""
    spec = importlib.util.find_spec("jaxlib")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if Path(place, "include", "xla", "ffi", "api", "ffi.h").exists():
            return Path(place, "include")
    raise Failure("jaxlib's headers were not found when it was installed")


def key_of(folder: Path, compiler: list[str], flags: tuple[str, ...], include: Path) -> str:
    """Changes with everything that the library is made of."""
    digest = hashlib.sha256(run([*compiler, "--version"]).encode())
    digest.update(repr((compiler, flags)).encode())
    sources = [*folder.glob("*.h"), *folder.glob("*.cc"), Path(__file__)]
    for path in [*sorted(sources), *sorted((include / "xla" / "ffi" / "api").glob("*.h"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(command: list[str]) -> str:
    """What the command says.

    Raises:
      Failure: it does not succeed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Failure(f"when it was installed, {command[0]} did not run: {error}") from error
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        problem = (lines or ["no error message"])[0]
        raise Failure(f"when it was installed, {command[0]} failed: {problem}")
    return done.stdout


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    compile_library(Path(__file__).parent)
