"""Several processes train as one, stop as one, and end when one of them is lost."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console
from settings import config_of
from training_runs import AGAIN, SCRIPT, lines

from alexnet.config import TrainConfig
from alexnet.training.loop import Loop
from alexnet.training.run import CONFIG, set_up

pytestmark = [pytest.mark.slow, pytest.mark.training]

SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "learning_rate": 2e-4,
    "schedule": "constant",
    "warmup_epochs": 0.0,
}


@pytest.fixture
def folder(folder, cache) -> Path:
    """Where there are images to train on, and the cache has the same name in every process."""
    (folder / "cache").symlink_to(cache)
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def by_hand(count: int, number: int, port: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """The options and the environment of one process, started by hand."""
    if count == 1:
        return (), {}
    return (
        *("--coordinator", f"127.0.0.1:{port}"),
        *("--num-processes", str(count), "--process-id", str(number)),
    ), {}


def by_slurm(count: int, number: int, port: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """The options and the environment of one process that srun has started."""
    return ("--distributed",), {
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
    }


@contextmanager
def started(
    folder: Path, count: int, *arguments, how=by_hand, only_the_second: tuple = ()
) -> Iterator[list[subprocess.Popen]]:
    """The script in several processes; what each says is in files of its own."""
    port = free_port()
    processes = []
    for number in range(count):
        options, environment = how(count, number, port)
        options = [*options, "--cache", "cache", *map(str, only_the_second if number else ())]
        with (folder / f"{number}.out").open("w") as out, (folder / f"{number}.err").open("w") as e:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-u", SCRIPT, *map(str, arguments), *options],
                    cwd=folder,
                    stdout=out,
                    stderr=e,
                    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
                )
            )
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def train(folder: Path, count: int, *arguments, how=by_hand) -> None:
    """The script to its end."""
    with started(folder, count, *arguments, how=how) as processes:
        for number, process in enumerate(processes):
            assert process.wait(timeout=300) == 0, (folder / f"{number}.err").read_text()


def new_run(mesh: tuple[int, int], epochs: int) -> tuple:
    options = {"data": "folder:images", "run-dir": "run", "epochs": epochs, **SETTINGS}
    named = (x for name, value in options.items() for x in ("--" + name.replace("_", "-"), value))
    return *named, "--mesh", *mesh


def evaluations(folder: Path) -> list[dict]:
    return lines(folder / "run", "eval")


def evaluations_of_one_process(folder: Path, epochs: int) -> list[dict]:
    """A run on one device, in this process."""
    config = config_of(
        data=f"folder:{folder / 'images'}",
        mesh=(1, 1),
        epochs=epochs,
        run_dir=folder / "alone",
        **SETTINGS,
    )
    # The schedule mixes types.
    with jax.numpy_dtype_promotion("standard"):
        run = set_up(config)
        assert Loop(run, Console(quiet=True), lambda step: False).train()
        run.close()
    return lines(folder / "alone", "eval")


def wait_for(condition: Callable[[], object], folder: Path, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, (folder / "0.err").read_text()
        time.sleep(0.02)


def assert_same(actual: list[dict], expected: list[dict]) -> None:
    """The same epochs; sums are made in another order, which shows more after every step."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        first = ours["epoch"] == 1
        assert (ours["epoch"], ours["step"]) == (theirs["epoch"], theirs["step"])
        tolerance = 2e-4 if first else 0.02
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=tolerance)
        if first:
            assert ours["top1_error"] == theirs["top1_error"]


@pytest.mark.parametrize(
    ("count", "mesh", "how"), [(2, (1, 2), by_hand), (2, (2, 1), by_slurm), (4, (2, 2), by_hand)]
)
def test_several_processes_train_as_one(folder, count, mesh, how):
    train(folder, count, *new_run(mesh, epochs=1), how=how)
    assert_same(evaluations(folder), evaluations_of_one_process(folder, 1))
    assert (folder / "run" / "filters.png").exists()
    told = [(folder / f"{number}.out").read_text() for number in range(count)]
    assert f"data {mesh[0]} x group {mesh[1]}" in told[0]
    assert "epoch   1: train loss" in told[0]
    assert not any("epoch" in others for others in told[1:])


@pytest.mark.parametrize(("killed", "placement"), [(0, "shard_map"), (1, "jit")])
def test_when_one_is_killed_the_others_end_and_the_run_goes_on(folder, killed, placement):
    epochs = 30
    with started(folder, 2, *new_run((1, 2), epochs), "--placement", placement) as processes:
        wait_for(lambda: len(evaluations(folder)) >= 2, folder, processes[killed])
        processes[killed].send_signal(signal.SIGKILL)
        assert processes[1 - killed].wait(timeout=200) != 0
    assert "go on with --resume --run-dir run" in (folder / "0.out").read_text()
    before = len(evaluations(folder))
    assert 2 <= before < epochs - 3

    # Two processes begin the run, one goes on with it alone, and two end it.
    shown = before + 3
    with started(folder, 1, *AGAIN, "--mesh", 1, 1) as (alone,):
        wait_for(lambda: len(evaluations(folder)) >= shown, folder, alone)
    train(folder, 2, *AGAIN, "--mesh", 2, 1)
    found = evaluations(folder)
    assert [line["epoch"] for line in found] == list(range(1, epochs + 1))
    assert_same(found[:shown], evaluations_of_one_process(folder, shown))


def test_all_go_on_from_a_checkpoint_that_each_can_read(folder):
    train(folder, 2, *new_run((1, 2), epochs=2))
    before = evaluations(folder)
    checkpoints = folder / "run" / "checkpoints"
    newest = max(int(path.name) for path in checkpoints.iterdir())
    # Only the second process reads what it has written.
    data = (checkpoints / str(newest) / "state" / "ocdbt.process_1" / "d").iterdir()
    largest = max(data, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    train(folder, 2, *AGAIN)
    for number in range(2):
        said = (folder / f"{number}.err").read_text()
        assert f"checkpoints/{newest}: " in said
        assert f"going on from step {newest // 2}" in said
    assert (checkpoints / f"damaged-{newest}").exists()
    assert_same(evaluations(folder), before)
    train(folder, 2, *AGAIN, "--epochs", 3)
    assert "The run now ends after 24 steps" in (folder / "0.out").read_text()
    assert [line["epoch"] for line in evaluations(folder)] == [1, 2, 3]
    assert TrainConfig.load(folder / "run" / CONFIG)[0].epochs == 3


@pytest.mark.parametrize(
    ("mesh", "different", "reason"),
    [
        ((1, 1), (), "a mesh of 1 x 1 has devices of 1 of the 2 processes; it must have some of"),
        ((1, 2), ("--seed", 3), "the processes of a run must have the same settings"),
        ((1, 2), ("--data", "folder:nowhere"), "cannot read the folder nowhere"),
    ],
    ids=["mesh", "settings", "an error of one"],
)
def test_processes_begin_together_or_not_at_all(folder, mesh, different, reason):
    options = new_run(mesh, epochs=1)
    with started(folder, 2, *options, only_the_second=different) as processes:
        codes = [process.wait(timeout=200) for process in processes]
    assert codes[1] == 2
    assert codes[0] != 0
    said = (folder / "1.err").read_text()
    assert f"\nerror: {reason}" in said
    assert "Traceback" not in said
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("told", "early", "placement"),
    [((0,), False, "shard_map"), ((1,), True, "jit")],
    ids=["the first", "the second, before the first step"],
)
def test_asked_to_stop_all_save_and_the_run_goes_on(folder, told, early, placement):
    epochs = 12
    said = folder / "0.out"
    with started(folder, 2, *new_run((1, 2), epochs), "--placement", placement) as processes:
        begun = (lambda: "Run folder" in said.read_text()) if early else lambda: evaluations(folder)
        wait_for(begun, folder, processes[0])
        for number in told:
            processes[number].terminate()
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    stopped = re.search(r"Asked to stop: all is saved after step (\d+)\.", said.read_text())
    assert stopped
    step = int(stopped[1])
    assert step < (8 if early else 8 * epochs)
    assert not any("Traceback" in (folder / f"{number}.err").read_text() for number in range(2))
    assert (folder / "run" / "checkpoints" / str(step)).exists()
    train(folder, 2, *AGAIN)
    found = evaluations(folder)
    assert [line["epoch"] for line in found] == list(range(1, epochs + 1))
    assert_same(found[:3], evaluations_of_one_process(folder, 3))


def test_interrupted_all_end(folder):
    with started(folder, 2, *new_run((1, 2), epochs=40)) as processes:
        wait_for(lambda: evaluations(folder), folder, processes[0])
        for process in processes:
            process.send_signal(signal.SIGINT)
        assert all(process.wait(timeout=60) != 0 for process in processes)
    assert "go on with --resume --run-dir run\n" in (folder / "0.err").read_text()


def test_an_error_of_one_process_ends_the_others(folder):
    for path in sorted((folder / "images" / "a").iterdir())[:3]:
        path.write_bytes(b"")
    # The processes read different images, and one of them is the first to have read two of these.
    with started(folder, 2, *new_run((2, 1), epochs=40), "--max-damaged", 1) as processes:
        codes = [process.wait(timeout=200) for process in processes]
    alone = codes.index(2)
    said = (folder / f"{alone}.err").read_text()
    assert re.search(r"\nerror: 2 images are damaged, of 1 that may be; .*\n$", said)
    assert codes[1 - alone] != 0


def test_an_error_of_all_processes_is_told_by_each(folder):
    options = new_run((1, 2), epochs=40)
    with started(folder, 2, *options, "--learning-rate", 1e12) as processes:
        assert [process.wait(timeout=100) for process in processes] == [1, 1]
    for number in range(2):
        said = (folder / f"{number}.err").read_text()
        assert re.fullmatch(r"meeting .*\nerror: (the loss|a parameter) is .*\n", said), said


def test_a_process_may_be_much_slower_to_load():
    code = (
        "import sys, time; from alexnet.config import Devices\n"
        "from alexnet.training import processes\n"
        "number = int(sys.argv[1])\n"
        "processes.join(Devices(coordinator=sys.argv[2], num_processes=2, process_id=number))\n"
        # This is longer than the runtime lets a collective wait.
        "time.sleep(40 * number); processes.synchronize('loaded'); print('here')"
    )
    address = f"127.0.0.1:{free_port()}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number), address],
            cwd=SCRIPT.parent,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for number in range(2)
    ]
    assert [process.communicate(timeout=100)[0] for process in both] == ["here\n"] * 2
