"""A run that is hurt goes on where it was, or says in one sentence why it cannot."""

import contextlib
import dataclasses
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from image_folders import save_classes
from settings import config_of
from training_runs import (
    AGAIN,
    finish,
    lines,
    run,
    run_well,
    started,
    steps_of_checkpoints,
    until,
)

from alexnet.errors import UsageError
from alexnet.training.run import set_up

pytestmark = [pytest.mark.slow, pytest.mark.training]

STEPS = 24
OPTIONS = (
    *("--data", "folder:images", "--run-dir", "run", "--batch-size", "16", "--steps", str(STEPS)),
    *("--log-every", "1", "--checkpoint-every", "3", "--max-damaged", "2"),
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache) -> list[dict]:
    """The lines of a run that nothing happens to."""
    found = []
    for name in ("first", "second"):
        folder = tmp_path_factory.mktemp(name)
        save_classes(folder / "images", {"a": 40, "b": 40})
        programs = set(cache.rglob("*-cache"))
        run_well(folder, cache, *OPTIONS)
        found.append(lines(folder / "run"))
    # The second run finds every program.
    assert programs
    assert set(cache.rglob("*-cache")) == programs
    assert found[0] == found[1]
    steps = [[line["step"] for line in found[0] if line["kind"] == k] for k in ("train", "eval")]
    assert steps == [list(range(1, STEPS + 1)), list(range(4, STEPS + 1, 4))]
    return found[0]


def test_killed_again_and_again_the_losses_are_those_of_an_uninterrupted_run(
    folder, cache, uninterrupted
):
    draw = np.random.default_rng(0)
    arguments = OPTIONS
    for _ in range(3):
        with started(folder, cache, *arguments) as process:
            # Anywhere from the first checkpoint on: in a step, in a test, while it logs or saves.
            until(lambda: steps_of_checkpoints(folder / "run"), process)
            wait_for = len(lines(folder / "run")) + int(draw.integers(0, 8))
            until(lambda n=wait_for: len(lines(folder / "run")) >= n, process)
            time.sleep(float(draw.uniform(0, 0.2)))
            process.kill()
        arguments = AGAIN
    run_well(folder, cache, *AGAIN)
    assert lines(folder / "run") == uninterrupted


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_and_ends_well(folder, cache, uninterrupted, workers):
    """Clusters send it to all processes of a job, to those that read images too."""
    options = (*OPTIONS, "--workers", workers)
    with started(folder, cache, *options, start_new_session=True) as process:
        until(lambda: len(lines(folder / "run")) > 5, process)
        os.killpg(process.pid, signal.SIGTERM)
        code, out, err = finish(process)
    assert code == 0, err
    stopped = re.search(r"Asked to stop: all is saved after step (\d+)", out)
    assert stopped, out
    assert 5 <= int(stopped[1]) < STEPS
    assert steps_of_checkpoints(folder / "run")[-1] == int(stopped[1])
    run_well(folder, cache, *AGAIN)
    assert lines(folder / "run") == uninterrupted
    assert f"All {STEPS} steps were done before." in run_well(folder, cache, *AGAIN)
    assert lines(folder / "run") == uninterrupted


def test_a_truncated_checkpoint_is_passed_over(folder, cache, uninterrupted):
    run_well(folder, cache, *OPTIONS)
    checkpoints = folder / "run" / "checkpoints"
    *_, before, newest = steps_of_checkpoints(folder / "run")
    assert newest == STEPS
    files = [file for file in (checkpoints / str(newest)).rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    code, _, err = run(folder, cache, *AGAIN)
    assert code == 0, err
    assert f"cannot be read, run/checkpoints/{newest}: " in err
    assert f"going on from step {before}" in err
    assert lines(folder / "run") == uninterrupted
    assert steps_of_checkpoints(folder / "run")[-1] == STEPS
    assert (checkpoints / f"damaged-{newest}").exists()


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
    # There is room for the first checkpoints, until the rest is filled up.
    with small_file_system(folder / "run", "32m"):
        filler = folder / "run" / "checkpoints" / "filler"
        with started(folder, cache, *OPTIONS, "--keep", 1) as process:
            until(lambda: len(steps_of_checkpoints(folder / "run")) >= 2, process)
            with filler.open("wb", buffering=0) as file:
                # Until it has ended: deleted checkpoints make room again.
                deadline = time.monotonic() + 300
                while process.poll() is None and time.monotonic() < deadline:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        time.sleep(0.01)
            code, _, err = finish(process)
        assert code == 1, err
        assert err.count("\n") == 1, err
        assert re.match(r"error: cannot write .*No space left on device", err), err
        assert re.search(r"the last whole (?:one|checkpoint) is run/checkpoints/(\d+)", err), err
        filler.unlink()
        run_well(folder, cache, *AGAIN, "--keep", 1)


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
    assert steps_of_checkpoints(folder / "run")[-1] == int(told[3]) < int(told[2])


def test_two_do_not_train_in_one_folder(folder):
    config = config_of(
        data=f"folder:{folder / 'images'}", batch_size=8, mesh=(1, 1), run_dir=folder / "run"
    )
    first = set_up(config)
    again = dataclasses.replace(config, resume=True)
    with pytest.raises(UsageError, match="another process is training in"):
        set_up(again)
    # Another process may look meanwhile, and changes nothing.
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
    assert not math.isnan(float(lines(folder / "run")[-1]["loss"]))
