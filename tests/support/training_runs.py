"""The training script in processes of its own, and what it leaves in its folder."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "examples" / "train_alexnet.py"

AGAIN = ("--resume", "--run-dir", "run")


@contextlib.contextmanager
def started(folder: Path, cache: Path, *arguments: Any, **options: Any) -> Iterator:
    """Starts the script in a folder, and ends it with the block."""
    command = [sys.executable, "-u", SCRIPT, *map(str, arguments), "--cache", str(cache)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, **pipes, **options)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Returns exit code, output and errors of a script that ends by itself."""
    out, err = process.communicate(timeout=900)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def run(folder: Path, cache: Path, *arguments: Any, **options: Any) -> tuple[int, str, str]:
    with started(folder, cache, *arguments, **options) as process:
        return finish(process)


def run_well(folder: Path, cache: Path, *arguments: Any, **options: Any) -> str:
    """Returns the output of a run that ends well."""
    code, out, err = run(folder, cache, *arguments, **options)
    assert code == 0, err
    return out


def lines(folder: Path, kind: str | None = None) -> list[dict]:
    """Returns what was logged in whole lines, without the speed, which differs in every run."""
    path, found = folder / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(text))
    return [
        {k: v for k, v in line.items() if "per_second" not in k and "flop" not in k}
        for line in found
        if kind in (None, line["kind"])
    ]


def steps_of_checkpoints(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdecimal())


def until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Waits for a condition while a process runs."""
    while not condition():
        assert process.poll() is None, "the process has ended"
        time.sleep(0.01)
