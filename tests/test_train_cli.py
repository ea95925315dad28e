"""The training script as a user runs it: in a process of its own, to its files and exit code."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import save_classes
from train_alexnet import newest_run, set_up

from alexnet.config import TrainConfig
from alexnet.errors import UsageError

SCRIPT = Path(__file__).parents[1] / "examples" / "train_alexnet.py"


def run(*arguments, cwd, optimized: bool = False) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | ({} if optimized else {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}),
        check=False,
    )


def evaluations(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_help_explains_every_option(tmp_path):
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in result.stdout
    words = " ".join(result.stdout.replace("│", " ").split())
    for phrase in ("What to train on", "Towers that the net is cut into", "Go on from the newest"):
        assert phrase in words


def test_a_run_and_its_continuation(tmp_path):
    save_classes(tmp_path / "images", {"a": 40, "b": 40})
    settings = (
        "--data", "folder:images", "--epochs", 2, "--batch-size", 16, "--run-dir", "run"
    )  # fmt: skip
    result = run(*settings, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "data 1 x group 2" in result.stdout
    assert "cpu:0" in result.stdout
    assert "cpu:1" in result.stdout
    assert "50%" in result.stdout
    folder = tmp_path / "run"
    lines = evaluations(folder)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["step"] for line in lines] == [4, 8]
    assert f"Test accuracy: {lines[-1]['test_accuracy']:.2%}" in result.stdout
    assert json.loads((folder / "config.json").read_text())["towers"] == 2
    with Image.open(folder / "filters.png") as image:
        assert np.ptp(np.asarray(image.convert("L"))) > 100
    assert "conv3  fprop        group  all-gather" in result.stdout
    assert "conv3" in (folder / "placement.svg").read_text()

    # As if it had been killed in the second epoch, while it wrote the evaluation.
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(newest)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')
    result = run(
        "--resume", "--run-dir", "run", "--mesh", 2, 1, "--placement", "pmap", cwd=tmp_path
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "data 2 x group 1" in result.stdout
    again = evaluations(folder)
    assert [line["epoch"] for line in again] == [1, 2]
    assert again[0] == lines[0]
    assert again[1]["train_loss"] == pytest.approx(lines[1]["train_loss"], rel=1e-3)

    for mistake, message in (
        (["--resume", "--seed", 1], "the run to resume was started with --seed 0, not 1"),
        ([], "run is not empty; go on with --resume"),
    ):
        result = run("--run-dir", "run", *mistake, cwd=tmp_path)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_run_stopped_at_once_goes_on(tmp_path):
    save_classes(tmp_path / "images", {"a": 40, "b": 40})
    arguments = ("--data", "folder:images", "--epochs", "1", "--batch-size", "16")
    process = subprocess.Popen(
        [sys.executable, "-u", SCRIPT, *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Run folder: "):
            break
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    hint = re.search(r"stopped; go on with (--resume --run-dir \S+)\n", stderr)
    assert hint is not None, stderr
    result = run(*hint[1].split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(evaluations(folder)) == 1
    assert "All 1 epochs were done before" in run("--resume", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--colour", "blue"], "Unrecognized options: --colour"),
        (["--preset", "huge"], "huge"),
        (["--mesh", 0, 2], "error: --mesh must be two numbers of at least 1, got (0, 2)"),
        (["--data", "folder:."], "error: no images in ."),
        (["--placement", "magic"], "magic"),
        (["--distributed"], "error: --distributed finds no cluster"),
    ],
)
def test_a_mistake_is_told_without_a_traceback_and_with_exit_code_2(tmp_path, arguments, message):
    result = run(*arguments, cwd=tmp_path)
    words = " ".join(result.stderr.replace("│", " ").split())
    assert result.returncode == 2, result.stderr
    assert message in words
    assert "Traceback" not in result.stderr
    if "error: " in message:
        assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))


PROCESSES = {"coordinator": "host:1234", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": -4}, "--batch-size must be at least 1, got -4"),
        ({"learning_rate": -1.0}, "--learning-rate must be 0 or more, got -1.0"),
        ({"weight_decay": float("nan")}, "--weight-decay must be 0 or more, got nan"),
        ({"data": "cifar"}, '--data must be "digits", "photos" or "folder:DIR"'),
        ({"data": "folder:missing"}, "cannot read the folder missing: No such file"),
        ({"towers": 5}, r"towers=5 does not divide the features of conv1 \(32\)"),
        ({"towers": 64}, r"towers=64 does not divide the features of conv1 \(32\)"),
        ({"mesh": (3, 2)}, "a batch of 64 images does not divide over 3 devices"),
        ({"coordinator": "host:1234"}, "--coordinator, --num-processes and --process-id go"),
        (PROCESSES | {"coordinator": "host"}, "--coordinator must be HOST:PORT, got host"),
        (PROCESSES | {"coordinator": "host:99999"}, "--coordinator must be HOST:PORT"),
        (PROCESSES | {"num_processes": 0}, "--num-processes must be at least 1, got 0"),
        (PROCESSES | {"process_id": 2}, "--process-id must be from 0 to 1, got 2"),
        (PROCESSES | {"placement": "pmap"}, "--placement pmap runs in one process; take shard_map"),
        ({"mesh": (1, 4)}, "2 towers cannot be shared by 4 devices"),
        ({"mesh": (3, 3)}, "a mesh of 3 x 3 needs 9 devices, there are 8"),
        ({"batch_size": 5000}, "a batch of 5000 is more than the 1438 training images"),
        ({"implementation": "magic"}, "unknown implementation 'magic'; known: xla, lax"),
        ({"seed": 2**32}, r"--seed must be less than 2\*\*32, got 4294967296"),
        ({"mesh": (10**11, 1)}, "--mesh must be at most 4096 devices"),
        ({"data": "folder:"}, '--data must be "digits", "photos" or "folder:DIR"'),
        ({"run_dir": Path("file/below")}, "cannot make the run folder"),
    ],
    ids=str,
)
def test_what_a_run_cannot_start_with_is_refused(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    config = TrainConfig(**settings)

    def start():
        config.check()
        set_up(config)

    with pytest.raises(UsageError, match=message):
        start()
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_not_there_is_not_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="nothing to resume: no run in"):
        newest_run()
    with pytest.raises(UsageError, match="nothing to resume: no run in none"):
        TrainConfig.load(Path("none"))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match=r"config\.json is not what a run has written"):
        TrainConfig.load(tmp_path)


def test_settings_are_saved_and_loaded(tmp_path):
    config = TrainConfig(data="photos", mesh=(2, 2), learning_rate=0.5)
    config.save(tmp_path / "config.json", classes=["a"])
    loaded, more = TrainConfig.load(tmp_path)
    assert loaded == dataclasses.replace(config, run_dir=tmp_path, resume=True)
    assert more == {"classes": ["a"]}


@pytest.mark.slow
def test_changed_images_and_damaged_checkpoints_are_not_resumed_from(tmp_path):
    save_classes(tmp_path / "images", {"a": 12, "b": 12})
    config = TrainConfig(
        data=f"folder:{tmp_path / 'images'}", batch_size=8, run_dir=tmp_path / "run", mesh=(1, 1)
    )
    set_up(config).checkpoints.close()
    resumed = dataclasses.replace(config, resume=True)
    files = [f for f in (tmp_path / "run" / "checkpoints" / "0").rglob("*") if f.is_file()]
    for file in files:
        file.write_bytes(file.read_bytes()[:3])
    with pytest.raises(UsageError, match=r"cannot read the checkpoint .*checkpoints/0: "):
        set_up(resumed)
    save_classes(tmp_path / "images", {"c": 12})
    with pytest.raises(UsageError, match=r"the images of folder:.* have changed since"):
        set_up(resumed)


@pytest.mark.slow
def test_a_folder_of_images_is_trained_on_with_four_towers(tmp_path):
    save_classes(tmp_path / "images", {"a": 12, "b": 12})
    result = run(
        "--data", "folder:images", "--towers", 4, "--epochs", 1, "--batch-size", 8, cwd=tmp_path
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "1, 2" in result.stdout
    assert "3, 4" in result.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert 0 <= evaluations(folder)[-1]["test_accuracy"] <= 1


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    save_classes(tmp_path / "images", {"a": 12, "b": 12})
    result = run(
        "--data", "folder:images", "--batch-size", 4, "--learning-rate", 1e30, "--epochs", 3,
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 1
    assert "error: the loss is" in result.stderr
    assert "try a smaller --learning-rate" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_default_run_reaches_97_percent(tmp_path):
    result = run(cwd=tmp_path, optimized=True)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert evaluations(folder)[-1]["test_accuracy"] >= 0.97


@pytest.mark.slow
def test_the_photographs_are_told_apart(tmp_path):
    result = run("--data", "photos", cwd=tmp_path, optimized=True)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert evaluations(folder)[-1]["test_accuracy"] >= 0.6
