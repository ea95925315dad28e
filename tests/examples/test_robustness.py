"""A run that is hurt goes on where it was, or says in one sentence why it cannot."""

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from image_folders import save_classes
from settings import config_of

from alexnet.errors import UsageError
from alexnet.training.run import set_up

pytestmark = [pytest.mark.slow, pytest.mark.training]

SCRIPT = Path(__file__).parents[2] / "examples" / "train_alexnet.py"

STEPS = 24
OPTIONS = (
    *("--data", "folder:images", "--run-dir", "run", "--batch-size", "16", "--steps", str(STEPS)),
    *("--log-every", "1", "--checkpoint-every", "3", "--max-damaged", "2"),
)
AGAIN = ("--resume", "--run-dir", "run")


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _leave_none_behind() -> Iterator[None]:
    """A test that fails before its processes have ended ends them."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate()


def start(folder: Path, cache: Path, *arguments, **options) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-u", SCRIPT, *map(str, arguments), "--cache", str(cache)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    STARTED.append(process)
    return process


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    STARTED.remove(process)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def run(folder: Path, cache: Path, *arguments, **options) -> tuple[int, str, str]:
    return finish(start(folder, cache, *arguments, **options))


def lines(folder: Path) -> list[dict]:
    """What was logged of whole lines, without the speed, which is never the same."""
    path, found = folder / "run" / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            found.append(
                {k: v for k, v in line.items() if "per_second" not in k and "flop" not in k}
            )
    return found


def steps_of_checkpoints(folder: Path) -> list[int]:
    return sorted(
        int(p.name) for p in (folder / "run" / "checkpoints").glob("[0-9]*") if p.name.isdigit()
    )


def until(condition, process: subprocess.Popen) -> None:
    while not condition():
        if process.poll() is not None:
            pytest.fail(str(process.communicate()))
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache) -> list[dict]:
    """The lines of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    save_classes(folder / "images", {"a": 40, "b": 40})
    code, out, err = run(folder, cache, *OPTIONS)
    assert code == 0, err
    found = lines(folder)
    assert [line["step"] for line in found if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in found if line["kind"] == "eval"] == list(
        range(4, STEPS + 1, 4)
    )
    assert (folder / "run" / "curves.png").exists()
    # The next one, of the same settings, finds every program.
    other = tmp_path_factory.mktemp("other")
    save_classes(other / "images", {"a": 40, "b": 40})
    code, out, err = run(other, cache, *OPTIONS)
    assert re.search(r"Programs compiled: 0, .* from the cache: [1-9]", out), out
    assert lines(other) == found
    return found


@pytest.mark.parametrize("seed", [0])
def test_killed_again_and_again_the_losses_are_those_of_an_uninterrupted_run(
    folder, cache, uninterrupted, seed
):
    draw = np.random.default_rng(seed)
    process = start(folder, cache, *OPTIONS)
    for _ in range(3):
        # Anywhere from the first checkpoint on: in a step, in a test, while it logs or saves.
        until(lambda: steps_of_checkpoints(folder), process)
        shown = len(lines(folder))
        wait_for = shown + int(draw.integers(0, 8))
        until(lambda wait_for=wait_for: len(lines(folder)) >= wait_for, process)
        time.sleep(float(draw.uniform(0, 0.2)))
        process.kill()
        process.communicate()
        process = start(folder, cache, *AGAIN)
    code, _, err = finish(process)
    assert code == 0, err
    assert lines(folder) == uninterrupted


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_and_ends_well(folder, cache, uninterrupted, workers):
    """Clusters send it to all processes of a job, to those that read images too."""
    process = start(folder, cache, *OPTIONS, "--workers", workers, start_new_session=True)
    until(lambda: len(lines(folder)) > 5, process)
    os.killpg(process.pid, signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    stopped = re.search(r"Asked to stop: all is saved after step (\d+)", out)
    assert stopped, out
    step = int(stopped[1])
    assert 5 <= step < STEPS
    assert steps_of_checkpoints(folder)[-1] == step
    code, out, err = run(folder, cache, *AGAIN)
    assert code == 0, err
    assert lines(folder) == uninterrupted
    code, out, err = run(folder, cache, *AGAIN)
    assert f"All {STEPS} steps were done before." in out
    assert lines(folder) == uninterrupted


def test_a_truncated_checkpoint_is_passed_over(folder, cache, uninterrupted):
    code, _, err = run(folder, cache, *OPTIONS)
    assert code == 0, err
    *_, before, newest = steps_of_checkpoints(folder)
    assert newest == STEPS
    damaged = folder / "run" / "checkpoints" / str(newest)
    largest = max((f for f in damaged.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    code, _, err = run(folder, cache, *AGAIN)
    assert code == 0, err
    assert "warning: passed over a checkpoint that cannot be read, " in err
    assert f"run/checkpoints/{newest}: " in err
    assert f"going on from step {before}" in err
    assert lines(folder) == uninterrupted
    assert steps_of_checkpoints(folder)[-1] == STEPS
    assert (folder / "run" / "checkpoints" / f"damaged-{newest}").exists()


@contextlib.contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system needs the right to mount one")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_clear_error(folder, cache):
    # Room for the first checkpoints, until the rest is filled up.
    with small_file_system(folder / "run", "32m"):
        process = start(folder, cache, *OPTIONS, "--keep", 1)
        until(lambda: len(steps_of_checkpoints(folder)) >= 2, process)
        free = os.statvfs(folder / "run")
        filler = folder / "run" / "checkpoints" / "filler"
        with filler.open("wb", buffering=0) as file:
            # Until it has ended: what it deletes meanwhile makes room again.
            deadline = time.monotonic() + 300
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    file.write(bytes(4096))
                except OSError:
                    time.sleep(0.01)
        code, _, err = finish(process)
        assert free.f_bfree > 0
        assert code == 1, err
        assert err.count("\n") == 1, err
        assert re.match(r"error: cannot write .*No space left on device", err), err
        whole = re.search(r"the last whole (?:one|checkpoint) is run/checkpoints/(\d+)", err)
        assert whole, err
        filler.unlink()
        code, _, err = run(folder, cache, *AGAIN, "--keep", 1)
        assert code == 0, err


def test_a_loss_that_is_not_a_number_stops_with_the_step_and_the_last_good_checkpoint(
    folder, cache
):
    code, _, err = run(folder, cache, *OPTIONS, "--learning-rate", "1e12", "--warmup-epochs", "1")
    assert code == 1
    assert err.count("\n") == 1, err
    told = re.match(
        r"error: (the loss is \S+|a parameter is not finite) after step (\d+); the last good "
        r"checkpoint is run/checkpoints/(\d+); try a smaller --learning-rate",
        err,
    )
    assert told, err
    assert int(told[3]) < int(told[2])
    assert steps_of_checkpoints(folder)[-1] == int(told[3])


def test_two_do_not_train_in_one_folder(folder):
    config = config_of(
        data=f"folder:{folder / 'images'}", batch_size=8, mesh=(1, 1), run_dir=folder / "run"
    )
    first = set_up(config)
    again = dataclasses.replace(config, resume=True)
    with pytest.raises(UsageError, match="another process is training in"):
        set_up(again)
    # Who only looks may do so meanwhile, and changes nothing.
    (folder / "run" / "checkpoints" / "1.orbax-checkpoint-tmp-1").mkdir()
    before = sorted(folder.rglob("*"))
    set_up(dataclasses.replace(again, eval_only=True)).close()
    assert sorted(folder.rglob("*")) == before
    first.close()
    set_up(again).close()


def test_damaged_images_are_named_and_too_many_stop_the_run(folder, cache):
    images = sorted((folder / "images" / "a").iterdir())
    for path in images[:2]:
        path.write_bytes(path.read_bytes()[:100])
    code, out, err = run(folder, cache, *OPTIONS, "--workers", 1)
    assert code == 0, err
    assert "Damaged images: 2." in out
    for path in images[:2]:
        assert (out + err).count(f"{path.parent.name}/{path.name}") == 1
    for path in images[2:8]:
        path.write_bytes(b"")
    code, out, err = run(folder, cache, *OPTIONS, "--run-dir", "other")
    assert code in (1, 2)
    assert re.search(r"error: 3 images are damaged, of 2 that may be", err), err
    assert not math.isnan(float(lines(folder)[-1]["loss"]))
