"""Runs of several processes, on this machine: the losses of one process, and an end for all."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console
from settings import config_of

from alexnet.config import TrainConfig
from alexnet.reports.metrics import read_metrics
from alexnet.training.loop import Loop
from alexnet.training.run import CONFIG, set_up
from alexnet.training.stopping import Stop

pytestmark = pytest.mark.training

SCRIPT = Path(__file__).parents[2] / "examples" / "train_alexnet.py"

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
    """The same of one that srun has started."""
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
    return [line for line in read_metrics(folder / "run") if line["kind"] == "eval"]


def evaluations_of_one_process(folder: Path, epochs: int, towers: int = 2) -> list[dict]:
    """A run on one device, in this process."""
    alone = folder / "alone"
    config = config_of(
        data=f"folder:{folder / 'images'}",
        mesh=(1, 1),
        epochs=epochs,
        towers=towers,
        run_dir=alone / "run",
        **SETTINGS,
    )
    # The schedule mixes types.
    with jax.numpy_dtype_promotion("standard"):
        run = set_up(config)
        assert Loop(run, Console(quiet=True), Stop()).train()
        run.close()
    return evaluations(alone)


def wait_for(condition: Callable[[], object], folder: Path, process: subprocess.Popen) -> None:
    while not condition():
        if process.poll() is not None:
            pytest.fail((folder / "0.err").read_text())
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh", "how"),
    [
        (2, (1, 2), by_hand),
        (2, (2, 1), by_slurm),
        (2, (2, 2), by_hand),
        (4, (2, 2), by_hand),
    ],
)
def test_several_processes_train_as_one(folder, count, mesh, how):
    towers = max(2, mesh[1])
    train(folder, count, *new_run(mesh, epochs=1), "--towers", towers, how=how)
    assert_same(evaluations(folder), evaluations_of_one_process(folder, 1, towers))
    assert (folder / "run" / "filters.png").exists()
    told = [(folder / f"{number}.out").read_text() for number in range(count)]
    assert f"data {mesh[0]} x group {mesh[1]}" in told[0]
    assert "epoch   1: train loss" in told[0]
    assert not any("epoch" in others for others in told[1:])


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "placement"), [(0, "shard_map"), (1, "jit")])
def test_when_one_is_killed_the_others_end_and_the_run_goes_on(folder, killed, placement):
    epochs = 30
    with started(folder, 2, *new_run((1, 2), epochs), "--placement", placement) as processes:
        wait_for(lambda: len(evaluations(folder)) >= 2, folder, processes[killed])
        processes[killed].send_signal(signal.SIGKILL)
        left = processes[1 - killed]
        assert left.wait(timeout=200) != 0
    said = (folder / f"{1 - killed}.err").read_text()
    assert (
        f"error: process {1 - killed} of 2 has ended: it was killed, or another one was; "
        "go on with --resume --run-dir run\n"
    ) in said
    assert "Traceback" not in said
    before = len(evaluations(folder))
    assert 2 <= before < epochs - 3

    # Killed by one, gone on with alone, and by both again.
    shown = before + 3
    with started(folder, 1, "--resume", "--run-dir", "run", "--mesh", 1, 1) as (alone,):
        wait_for(lambda: len(evaluations(folder)) >= shown, folder, alone)
    train(folder, 2, "--resume", "--run-dir", "run", "--mesh", 2, 1)
    lines = evaluations(folder)
    assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
    assert_same(lines[:shown], evaluations_of_one_process(folder, shown))


def program(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )


def test_an_end_by_the_runtime_is_explained():
    result = program(
        "import os; from alexnet.training.distributed import Process; process = Process('');"
        "process.joined(); process.way_back = '--resume'; os.abort()"
    )
    assert result.returncode == -signal.SIGABRT
    assert result.stderr == (
        "\nerror: process 0 of 1 has ended: it was killed, or another one was; "
        "go on with --resume\n"
    )


@pytest.mark.slow
def test_all_go_on_from_a_checkpoint_that_each_can_read(folder):
    train(folder, 2, *new_run((1, 2), epochs=2))
    before = evaluations(folder)
    checkpoints = folder / "run" / "checkpoints"
    newest = max(int(path.name) for path in checkpoints.iterdir())
    # What the second process has written, and alone reads.
    data = (checkpoints / str(newest) / "state" / "ocdbt.process_1" / "d").iterdir()
    largest = max(data, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    train(folder, 2, "--resume", "--run-dir", "run")
    for number in range(2):
        said = (folder / f"{number}.err").read_text()
        assert f"checkpoints/{newest}: " in said
        assert f"going on from step {newest // 2}" in said
    assert (checkpoints / f"damaged-{newest}").exists()
    assert_same(evaluations(folder), before)
    train(folder, 2, "--resume", "--run-dir", "run", "--epochs", 3)
    assert "The run now ends after 24 steps" in (folder / "0.out").read_text()
    assert [line["epoch"] for line in evaluations(folder)] == [1, 2, 3]
    assert TrainConfig.load(folder / "run" / CONFIG)[0].epochs == 3


@pytest.mark.slow
def test_processes_that_do_not_meet_say_so():
    port = free_port()
    result = program(
        "from alexnet import config; from alexnet.training import distributed\n"
        "distributed.TOGETHER = 3\n"
        f"one = dict(coordinator='127.0.0.1:{port}', num_processes=2, process_id=1)\n"
        "with distributed.joined(config.TrainConfig(devices=config.Devices(**one))): pass"
    )
    assert result.returncode != 0
    assert f"meeting the others at 127.0.0.1:{port}, for 3 seconds at most\n" in (result.stderr)
    assert f"error: this process has ended before it met the others at 127.0.0.1:{port}\n" in (
        result.stderr
    )


@pytest.mark.slow
def test_a_mesh_without_devices_of_some_process_is_refused(folder):
    with started(folder, 2, *new_run((1, 1), epochs=1)) as processes:
        assert [process.wait(timeout=200) for process in processes] == [2, 2]
    for number in range(2):
        said = (folder / f"{number}.err").read_text()
        assert (
            "error: a mesh of 1 x 1 has devices of 1 of the 2 processes; it must have some of each"
        ) in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("different", "reason"),
    [
        (("--seed", 3), "the processes of a run must have the same settings"),
        (("--data", "folder:nowhere"), "cannot read the folder nowhere"),
    ],
    ids=["settings", "an error of one"],
)
def test_processes_begin_together_or_not_at_all(folder, different, reason):
    options = new_run((1, 2), epochs=1)
    with started(folder, 2, *options, only_the_second=different) as processes:
        assert [process.wait(timeout=100) for process in processes] == [2, 2]
    said = [(folder / f"{number}.err").read_text() for number in range(2)]
    assert reason in said[1]
    assert all("\nerror: " in text for text in said)
    assert not any("Traceback" in text for text in said)
    assert not (folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "early", "placement"),
    [((0,), False, "shard_map"), ((0, 1), False, "jit"), ((1,), True, "jit")],
    ids=["the first", "both", "the second, before the first step"],
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
    assert "Go on with --resume --run-dir run\n" in said.read_text()
    stopped = re.search(r"Asked to stop: all is saved after step (\d+)\.", said.read_text())
    assert stopped
    step = int(stopped[1])
    assert step < 8 * epochs
    assert step < 8 or not early
    assert not any("Traceback" in (folder / f"{number}.err").read_text() for number in range(2))
    assert (folder / "run" / "checkpoints" / str(step)).exists()
    train(folder, 2, "--resume", "--run-dir", "run")
    lines = evaluations(folder)
    assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
    assert_same(lines[:3], evaluations_of_one_process(folder, 3))


@pytest.mark.slow
def test_interrupted_all_end_at_once(folder):
    with started(folder, 2, *new_run((1, 2), epochs=40)) as processes:
        wait_for(lambda: evaluations(folder), folder, processes[0])
        for process in processes:
            process.send_signal(signal.SIGINT)
        assert all(process.wait(timeout=20) != 0 for process in processes)
    assert "go on with --resume --run-dir run\n" in (folder / "0.err").read_text()


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others(folder):
    damaged = sorted((folder / "images" / "a").iterdir())[:3]
    for path in damaged:
        path.write_bytes(b"")
    options = new_run((2, 1), epochs=40)
    # The processes read different images, and one of them is the first to have read two of these.
    with started(folder, 2, *options, "--max-damaged", 1) as processes:
        codes = [process.wait(timeout=100) for process in processes]
    said = [(folder / f"{number}.err").read_text() for number in range(2)]
    alone = codes.index(2)
    assert re.search(r"\nerror: 2 images are damaged, of 1 that may be; .*\n$", said[alone])
    assert "Traceback" not in said[alone]
    # The other one may have come to the same, at the same time.
    assert codes[1 - alone] != 0
    assert re.search(
        rf"error: (process {1 - alone} of 2 has ended: .*; go on with|2 images are damaged)",
        said[1 - alone],
    )


@pytest.mark.slow
def test_an_error_of_all_processes_is_told_by_each(folder):
    options = new_run((1, 2), epochs=40)
    with started(folder, 2, *options, "--learning-rate", 1e12) as processes:
        assert [process.wait(timeout=100) for process in processes] == [1, 1]
    for number in range(2):
        said = (folder / f"{number}.err").read_text()
        assert re.fullmatch(r"meeting .*\nerror: (the loss|a parameter) is .*\n", said), said


@pytest.mark.slow
def test_a_process_may_be_much_slower_to_load():
    port = free_port()
    code = (
        "import sys, time; from alexnet import config; from alexnet.training import distributed\n"
        f"one = dict(coordinator='127.0.0.1:{port}', num_processes=2, process_id=NUMBER)\n"
        "with distributed.joined(config.TrainConfig(devices=config.Devices(**one))):\n"
        # Longer than the runtime lets a collective wait.
        "    time.sleep(40 * NUMBER); distributed.synchronize('loaded'); print('here')"
    )
    with ThreadPoolExecutor() as pool:
        results = pool.map(program, [code.replace("NUMBER", str(number)) for number in range(2)])
        assert [(result.returncode, result.stdout) for result in results] == [(0, "here\n")] * 2


def test_a_port_that_is_taken_is_said():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = program(
            "from alexnet import config\nfrom alexnet.training import distributed\n"
            f"one = dict(coordinator='127.0.0.1:{port}', num_processes=2, process_id=0)\n"
            "with distributed.joined(config.TrainConfig(devices=config.Devices(**one))): pass"
        )
    assert f"cannot use the port of --coordinator 127.0.0.1:{port}" in result.stderr
