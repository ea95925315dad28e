"""A fuzzer for the native kernels: random convolutions, all instruction sets, against NumPy.

python tests/native/fuzz.py --cases 100000
python tests/native/fuzz.py --cases 20000 --sanitize

It compiles the kernels without XLA and calls them on arrays that begin anywhere and end where a
page ends that may not be touched. What goes wrong is printed with the seed of its case, and
`--seed` with `--cases 1` repeats it. With `--sanitize` they are compiled with the address and the
undefined behaviour sanitizers, and the program starts again with their libraries loaded.
"""

import argparse
import ctypes
import dataclasses
import math
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from grouped_conv_jax.native import build

FOLDER = Path(__file__).parent
NATIVE = Path(build.__file__).parent

CONTRACTIONS = ("fprop", "dgrad", "wgrad")
DTYPES = (np.float32, np.float64, ml_dtypes.bfloat16)
WIDTHS = (1, 1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 12, 15, 16, 16, 17, 24, 31, 33, 48, 65)
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@dataclasses.dataclass(frozen=True)
class Case:
    """A forward convolution in two dimensions, and what is computed of it."""

    contraction: str
    dtype: type
    threads: int
    batch: int
    groups: int
    inputs: int
    outputs: int
    lhs: tuple[int, int]
    out: tuple[int, int]
    taps: tuple[int, int]
    strides: tuple[int, int]
    lhs_dilation: tuple[int, int]
    rhs_dilation: tuple[int, int]
    low: tuple[int, int]

    @classmethod
    def random(cls, draw: np.random.Generator) -> "Case":
        def pick(*values: int) -> int:
            return int(draw.choice(values))

        inputs = pick(*WIDTHS)
        outputs = inputs if draw.random() < 0.6 else pick(*WIDTHS)
        # Small, so that there can be many; now and then large enough for several tiles.
        groups = int(draw.integers(1, max(2, 130 // max(inputs, outputs))))
        is_large = draw.random() < 0.03
        has_many = draw.random() < 0.01  # Groups, for several chunks.
        if has_many:
            groups = int(draw.integers(100, max(101, 4000 // max(inputs, outputs))))
        elif draw.random() < 0.3:  # Pixels that are whole vectors may be read where they are.
            step = 16 // math.gcd(16, inputs)
            groups = -(-groups // step) * step
        lhs, out, taps, strides, lhs_dilation, rhs_dilation, low = [], [], [], [], [], [], []
        for axis in range(2):
            size = int(draw.integers(1, 8 if has_many else 90 if is_large and axis else 18))
            k = pick(1, 1, 2, 3, 3, 3, 4, 5, 7)
            s, d = pick(1, 1, 1, 2, 2, 3, 4), pick(1, 1, 1, 2, 3)
            gaps = pick(1, 1, 1, 1, 2, 3)
            extent, window = gaps * (size - 1) + 1, d * (k - 1) + 1
            before = int(draw.integers(-min(2, extent - 1), window + 2))
            after = int(draw.integers(-min(2, extent - 1), window + 2))
            results = (extent + before + after - window) // s + 1
            if results < 1:
                after = window - extent - before
                results = 1
            for values, value in (
                (lhs, size),
                (out, results),
                (taps, k),
                (strides, s),
                (lhs_dilation, gaps),
                (rhs_dilation, d),
                (low, before),
            ):
                values.append(value)
        return cls(
            contraction=str(draw.choice(CONTRACTIONS)),
            dtype=DTYPES[draw.choice(3, p=(0.5, 0.2, 0.3))],
            threads=pick(1, 1, 2, 3),
            batch=pick(1, 1, 2, 3, 5),
            groups=groups,
            inputs=inputs,
            outputs=outputs,
            lhs=tuple(lhs),
            out=tuple(out),
            taps=tuple(taps),
            strides=tuple(strides),
            lhs_dilation=tuple(lhs_dilation),
            rhs_dilation=tuple(rhs_dilation),
            low=tuple(low),
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "lhs": (self.batch, *self.lhs, self.groups * self.inputs),
            "rhs": (*self.taps, self.inputs, self.groups * self.outputs),
            "out": (self.batch, *self.out, self.groups * self.outputs),
        }

    @property
    def roles(self) -> tuple[str, str, str]:
        """The operands and the result."""
        return {
            "fprop": ("lhs", "rhs", "out"),
            "dgrad": ("out", "rhs", "lhs"),
            "wgrad": ("lhs", "out", "rhs"),
        }[self.contraction]

    @property
    def numbers(self) -> list[int]:
        """The dimensions of the correlation, as the kernels take them."""
        found = []
        for i in range(2):
            lhs, out, k = self.lhs[i], self.out[i], self.taps[i]
            s, gaps, d = self.strides[i], self.lhs_dilation[i], self.rhs_dilation[i]
            if self.contraction == "dgrad":
                found += [out, lhs, k, gaps, -d, s, -self.low[i]]
            else:
                found += [lhs, out, k, s, d, gaps, self.low[i]]
        return found

    def expected(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, int]:
        """In float64, tap by tap; and how many products an element is the sum of, at most."""
        values = {
            role: x.astype(np.float64) for role, x in zip(self.roles, (first, second), strict=False)
        }
        groups, result = self.groups, self.roles[2]
        total = np.zeros(self.shapes[result])
        x, w, y = (values.get(role, total) for role in ("lhs", "rhs", "out"))
        x = x.reshape(*x.shape[:3], groups, -1)
        y = y.reshape(*y.shape[:3], groups, -1)
        w = w.reshape(*w.shape[:3], groups, -1)
        for taps in np.ndindex(*self.taps):
            # Which results read which elements through this tap.
            reads = []
            for i, tap in enumerate(taps):
                q = np.arange(self.out[i])
                at = q * self.strides[i] + tap * self.rhs_dilation[i] - self.low[i]
                inside = (at % self.lhs_dilation[i] == 0) & (at >= 0)
                inside &= at // self.lhs_dilation[i] < self.lhs[i]
                reads.append((q[inside], at[inside] // self.lhs_dilation[i]))
            (rows, lhs_rows), (columns, lhs_columns) = reads
            if not len(rows) or not len(columns):
                continue
            seen = np.s_[:, lhs_rows[:, None], lhs_columns]
            made = np.s_[:, rows[:, None], columns]
            if result == "out":
                y[made] += np.einsum("nhwgc,cgo->nhwgo", x[seen], w[taps])
            elif result == "lhs":
                x[seen] += np.einsum("nhwgo,cgo->nhwgc", y[made], w[taps])
            else:
                w[taps] += np.einsum("nhwgc,nhwgo->cgo", x[seen], y[made])
        length = {
            "out": self.inputs * int(np.prod(self.taps)),
            "lhs": self.outputs * int(np.prod(self.taps)),
            "rhs": self.batch * int(np.prod(self.out)),
        }[result]
        return {"out": y, "lhs": x, "rhs": w}[result].reshape(total.shape), length


class Guarded:
    """Arrays that end where memory ends: the page after it may not be touched."""

    def __init__(self, pages: int):
        self.size = pages * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.size + mmap.PAGESIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self.address + self.size), mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")

    def array(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if nbytes > self.size:
            raise ValueError(f"{nbytes} bytes are more than {self.size}")
        view = memoryview(self.memory)[self.size - nbytes : self.size]
        return np.frombuffer(view, dtype).reshape(shape)


class Kernels:
    """The compiled kernels."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.instruction_set.restype = ctypes.c_char_p
        names = []
        while (name := self.library.instruction_set(len(names))) is not None:
            names.append(name.decode())
        self.sets = {name: i for i, name in enumerate(names) if name}
        self.buffers = [Guarded(32768) for _ in range(3)]

    def compute(self, case: Case, instruction_set: str, *operands: np.ndarray) -> np.ndarray:
        shapes, (first, second, result) = case.shapes, case.roles
        arrays = [
            buffer.array(shapes[role], case.dtype)
            for buffer, role in zip(self.buffers, (first, second, result), strict=True)
        ]
        for array, values in zip(arrays, operands, strict=False):
            array[...] = values
        arrays[2].view(np.uint8)[...] = 0xFF  # NaN, where nothing is written.
        self.library.use_instruction_set(self.sets[instruction_set])
        sizes = [case.batch, case.groups, case.inputs, case.outputs]
        if case.contraction == "dgrad":
            sizes[2:] = [case.outputs, case.inputs]
        code = self.library.direct(
            CONTRACTIONS.index(case.contraction),
            DTYPES.index(case.dtype),
            case.threads,
            (ctypes.c_int64 * 4)(*sizes),
            (ctypes.c_int64 * 14)(*case.numbers),
            *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
            ctypes.c_int64(arrays[2].nbytes),
        )
        if code:
            raise AssertionError(f"it was refused: {code}")
        return np.array(arrays[2])


def wrong(case: Case, kernels: Kernels, draw: np.random.Generator) -> str | None:
    """What is wrong, if something is: with one instruction set, drawn."""
    first, second, _ = (case.shapes[role] for role in case.roles)
    operands = [draw.uniform(-1, 1, shape).astype(case.dtype) for shape in (first, second)]
    name = str(draw.choice(list(kernels.sets)))
    found = kernels.compute(case, name, *operands).astype(np.float64)
    expected, length = case.expected(*operands)
    eps = float(ml_dtypes.finfo(case.dtype).eps)
    sums = min(eps, float(np.finfo(np.float32).eps))
    # Sums round as often as they are long; the result once more.
    tolerance = 4 * sums * length + eps * np.abs(expected)
    error = np.abs(found - expected)
    if not (error <= tolerance).all():
        return f"{name}: error {np.nanmax(error):.2e}, tolerance {np.min(tolerance):.2e}"
    return None


def library(folder: Path, sanitize: bool) -> Path:
    """Compiled, for all instruction sets."""
    target = folder / "direct.so"
    units = [*build.kernels(NATIVE)]
    units.append(build.Unit(FOLDER / "direct.cc", "direct", (f"-I{NATIVE}",)))
    flags = (*build.FLAGS, *(SANITIZERS if sanitize else ()))
    build.link(build.find_compiler(), flags, units, target)
    return target


def start_again_with_sanitizers() -> None:
    """The libraries of the sanitizers must be there before Python is."""
    if os.environ.get("GROUPED_CONV_JAX_FUZZ"):
        return
    names = ("libasan.so", "libubsan.so")
    (compiler, *_) = build.find_compiler()
    paths = [build.run([compiler, f"-print-file-name={name}"]).strip() for name in names]
    more = {
        "GROUPED_CONV_JAX_FUZZ": "1",
        "LD_PRELOAD": ":".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    sys.exit(subprocess.run([sys.executable, *sys.argv], env={**os.environ, **more}).returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description="Random convolutions, against NumPy.")
    parser.add_argument("--cases", type=int, default=10_000, help="how many convolutions")
    parser.add_argument("--seed", type=int, default=0, help="of the first one; then one more each")
    parser.add_argument("--sanitize", action="store_true", help="compile with sanitizers")
    parser.add_argument("--library", type=Path, help="an already compiled one")
    options = parser.parse_args()
    if options.sanitize:
        start_again_with_sanitizers()
    failures = done = 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kernels = Kernels(options.library or library(Path(folder), options.sanitize))
        for seed in range(options.seed, options.seed + options.cases):
            done += 1
            draw = np.random.default_rng(seed)
            case = Case.random(draw)
            if message := wrong(case, kernels, draw):
                failures += 1
                print(f"seed {seed}: {message}: {case}", flush=True)
                if failures == 10:
                    break
    seconds = time.monotonic() - began
    print(f"{done} cases, {failures} wrong, {', '.join(kernels.sets)}, {seconds:.0f} s")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
