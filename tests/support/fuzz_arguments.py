"""A fuzzer for the public functions: hostile arguments, which must not end the process.

python tests/support/fuzz_arguments.py --calls 10000
python tests/support/fuzz_arguments.py --call "channel_shuffle(ones((2, 6)), 2**62)"

Valid calls are spoiled in one to three arguments, and made in processes of their own. Each must
give a result or raise a ValueError, a TypeError or a NotImplementedError; memory may be too small.
What ends the process or hangs is found, and what raises anything else. It is printed once for each
place, with the text of a call that `--call` repeats.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import faulthandler
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

MEMORY = 6 * 2**30
"""Of the addresses of a process: what takes more fails there instead of slowing the machine."""

ALLOWED = ("ValueError", "TypeError", "NotImplementedError", "MemoryError", "IsADirectoryError")
"""What a call may raise."""

PACKAGE = "grouped_conv_jax"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
      seed: of the call.
      call: its text.
      kind: "result", the name of an exception, or how the process ended.
      place: where in the library.
      message: of the exception, or the last words of the process.
      ends_process: whether it did.
    """

    seed: int
    call: str
    kind: str = ""
    place: str = ""
    message: str = ""
    ends_process: bool = False

    @property
    def is_wrong(self) -> bool:
        return self.ends_process or self.kind not in ("result", "no arguments", *ALLOWED)


# The process that makes the calls.


def outcome(made: Outcome, call: Any) -> Outcome:
    """Makes a call."""
    try:
        run = call.prepared()
    except Exception:
        return dataclasses.replace(made, kind="no arguments")
    try:
        run()
    except Exception as error:
        return dataclasses.replace(
            made, kind=_kind(error), place=_place(error), message=str(error)[:300]
        )
    return dataclasses.replace(made, kind="result")


def _kind(error: Exception) -> str:
    """The name of an exception, or of an allowed one that it is one of, as those of jax are."""
    names = [kind.__name__ for kind in type(error).__mro__]
    if "JaxRuntimeError" in names:
        # What XLA says of memory, and of dtypes that it does not compute with.
        said = {"RESOURCE_EXHAUSTED": "MemoryError", "UNIMPLEMENTED": "NotImplementedError"}
        names += [name for words, name in said.items() if words in str(error)]
    return next((name for name in ALLOWED if name in names), names[0])


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return _in_library((f.filename, f.lineno, f.name) for f in reversed(frames))


def _in_library(frames: Iterable[tuple[str, int | str | None, str]]) -> str:
    """The innermost of frames, the innermost first, that is in the library."""
    for filename, line, name in frames:
        if f"/{PACKAGE}/" in filename:
            return f"{filename.rsplit(f'/{PACKAGE}/', 1)[1]}:{line} {name}"
    return "outside"


def work(options: argparse.Namespace) -> None:
    """Makes calls and writes each down, before and after."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    warnings.simplefilter("ignore")
    # Here, since the process that starts this one needs no JAX.
    from compilation import compile_quickly

    compile_quickly()
    import fuzz_calls

    with Path(options.log).open("a") as log:
        for seed in range(options.seed, options.seed + options.calls):
            call = fuzz_calls.random_call(seed, options.largest)
            begun = Outcome(seed, str(call))
            _write(log, begun)
            faulthandler.dump_traceback_later(options.limit, exit=True)
            ended = outcome(begun, call)
            faulthandler.cancel_dump_traceback_later()
            _write(log, ended)


def _write(log: TextIO, found: Outcome) -> None:
    log.write(json.dumps(dataclasses.asdict(found)) + "\n")
    log.flush()


# The process that starts those.


def outcomes(options: argparse.Namespace, first: int, count: int) -> Iterator[Outcome]:
    """Those of a batch, in as many processes as it takes."""
    end = first + count
    while first < end:
        found = _of_process(options, first, end - first)
        yield from found
        first = found[-1].seed + 1


def _of_process(options: argparse.Namespace, first: int, count: int) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder, "log"), Path(folder, "errors")
        more = ["--limit", str(options.limit), "--largest", str(options.largest)]
        command = [sys.executable, __file__, "--log", str(log), "--seed", str(first)]
        with errors.open("wb") as stderr:
            ended = subprocess.run(
                [*command, "--calls", str(count), *more],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={"JAX_PLATFORMS": "cpu", **os.environ, "TMPDIR": folder},
            )
        said = errors.read_text(errors="replace")
        text = log.read_text() if log.exists() else ""
        if not text:
            raise RuntimeError(f"the process made no call:\n{said}")
        lines = [Outcome(**json.loads(line)) for line in text.splitlines()]
    found = [line for line in lines if line.kind]
    if lines[-1].kind and len(found) == count:
        return found
    return [*found, _ended(lines[-1], ended.returncode, said)]


def _ended(call: Outcome, code: int, said: str) -> Outcome:
    """Of the call that ended the process, from what this said."""
    if call.kind:
        call = dataclasses.replace(call, call=f"after {call.call}")
    frames = re.findall(r'File "(.*)", line (\d+) in (.*)', said)
    words = [line for line in said.splitlines() if line and not line.startswith("  ")]
    kind = "hang" if "Timeout (" in said else f"signal {-code}" if code < 0 else f"exit {code}"
    return dataclasses.replace(
        call, kind=kind, place=_in_library(frames), message="; ".join(words[:2]), ends_process=True
    )


def report(found: Iterable[Outcome]) -> int:
    """Prints what became of the calls, and each finding once; how many there are."""
    kinds: collections.Counter[str] = collections.Counter()
    wrong: dict[tuple[str, str], list[Outcome]] = {}
    for one in found:
        kinds[one.kind] += 1
        if one.is_wrong:
            wrong.setdefault((one.kind, one.place), []).append(one)
            if len(wrong[one.kind, one.place]) == 1:
                print(f"{one.kind} at {one.place}: seed {one.seed}: {one.call}", flush=True)
    print()
    for kind, count in kinds.most_common():
        print(f"{count:8,} {kind}")
    for same in sorted(wrong.values(), key=lambda same: not same[0].ends_process):
        shortest = min(same, key=lambda one: len(one.call))
        print(f"\n{len(same)} x {shortest.kind} at {shortest.place}: {shortest.message}")
        print(f"  seed {shortest.seed}: {shortest.call}")
    return len(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description="Calls with hostile arguments.")
    parser.add_argument("--calls", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first one; then one more each")
    parser.add_argument("--batch", type=int, default=500, help="calls in one process")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--limit", type=float, default=30, help="seconds for one call")
    parser.add_argument("--largest", type=float, default=math.inf, help="integer to try")
    parser.add_argument("--call", help="the text of a single call, made in this process")
    parser.add_argument("--log", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        import fuzz_calls

        eval(options.call, fuzz_calls.NAMES)
        return
    if options.log:
        work(options)
        return
    began, end = time.monotonic(), options.seed + options.calls
    firsts = range(options.seed, end, options.batch)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        batches = pool.map(
            lambda first: list(outcomes(options, first, min(options.batch, end - first))), firsts
        )
        count = report(one for batch in batches for one in batch)
    seconds = time.monotonic() - began
    print(f"\n{options.calls:,} calls, {count} places with findings, {seconds:.0f} s")
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
