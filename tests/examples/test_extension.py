"""A resumed run with more or fewer steps: its settings, its learning rate and its losses."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console
from settings import config_of
from train_alexnet import parse
from training_runs import lines

from alexnet.config import TrainConfig
from alexnet.errors import UsageError
from alexnet.training.loop import Loop
from alexnet.training.run import CONFIG, Run, extension, set_up

PER_EPOCH = 8
"""Steps: 64 training images in batches of 8."""


@pytest.fixture(autouse=True)
def _mixed_types() -> Iterator[None]:
    """The schedules mix types."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def extended(before: dict[str, Any], now: dict[str, Any], done: int, **settings: Any) -> str:
    settings = {"learning_rate": 0.1, "warmup_epochs": 0.0} | settings
    return extension(
        config_of(**before, **settings),
        config_of(**now, **settings),
        done=done,
        steps_per_epoch=4,
        scale=1.0,
    )


@pytest.mark.parametrize(
    ("settings", "rate", "old"),
    [
        ({"schedule": "constant"}, "0.1", "0.1"),
        ({"schedule": "steps", "drop_epochs": (10.0, 19.0)}, "0.001", "0.001"),
        # A drop after the old end takes place where it was asked for.
        ({"schedule": "steps", "drop_epochs": (10.0, 21.0)}, "0.01", "0.01"),
        # 0.05 (1 + cos(80 pi / 88)).
        ({"schedule": "cosine"}, "0.002025", "0"),
    ],
    ids=str,
)
def test_the_learning_rate_of_a_longer_run_is_told(settings, rate, old):
    assert extended({"epochs": 20}, {"epochs": 22}, 80, **settings) == (
        "The run now ends after 88 steps (22 epochs) instead of 80 (20). The next learning rate is "
        f"{rate}; without the change it would be {old}."
    )


@pytest.mark.parametrize(
    ("before", "now", "done", "expected"),
    [
        ({"epochs": 5}, {"epochs": 5}, 20, ""),
        ({"epochs": 5}, {"steps": 20}, 20, ""),
        ({"epochs": 20}, {"epochs": 15}, 60, "after 60 steps (15 epochs) instead of 80 (20). The "),
        ({"steps": 6}, {"steps": 11}, 6, "after 11 steps (2.75 epochs) instead of 6 (1.5). The "),
        # The warm-up would have been of 4 steps and is one of 8.
        ({"epochs": 2}, {"epochs": 4}, 3, "rate is 0.0375; without the change it would be 0.075."),
    ],
    ids=str,
)
def test_a_new_length_is_told(before, now, done, expected):
    text = extended(before, now, done, schedule="constant", warmup_epochs=2.0)
    assert expected in text
    assert bool(expected) == bool(text)


def test_the_plateaus_factor_is_part_of_the_learning_rate():
    short, long = (config_of(epochs=n, schedule="plateau", learning_rate=0.1) for n in (20, 22))
    text = extension(short, long, done=80, steps_per_epoch=4, scale=0.01)
    assert "learning rate is 0.001; without the change it would be 0.001." in text


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            {"epochs": 20},
            {"epochs": 2},
            r"done 10 steps \(2.5 epochs\), so --epochs must be at .* 3",
        ),
        ({"steps": 20}, {"steps": 9}, "so --steps must be at least 10, got 9"),
    ],
    ids=str,
)
def test_a_run_is_not_made_shorter_than_it_is(before, now, message):
    with pytest.raises(UsageError, match=message):
        extended(before, now, 10)


def begun(folder: Path, schedule: str, **settings: Any) -> TrainConfig:
    settings = {"run_dir": folder, "log_every": 1, "learning_rate": 0.01} | settings
    images = f"folder:{folder.parent / 'images'}"
    return config_of(data=images, batch_size=8, mesh=(1, 1), schedule=schedule, **settings)


def trained(config: TrainConfig) -> Run:
    """A run to its end."""
    run = set_up(config)
    assert Loop(run, Console(quiet=True), lambda step: False).train()
    run.close()
    return run


def resumed(folder: Path, *options: str) -> Run:
    return trained(parse(["--resume", "--run-dir", str(folder), *options]))


@pytest.mark.slow
def test_a_run_extended_is_the_longer_run_bit_for_bit(folder):
    whole, short = folder / "whole", folder / "short"
    trained(begun(whole, "constant", epochs=3))
    trained(begun(short, "constant", epochs=2))
    assert lines(short) == lines(whole)[: len(lines(short))]
    resumed(short, "--epochs", "3")
    assert lines(short) == lines(whole)
    assert [x["step"] for x in lines(short) if x["kind"] == "eval"] == [8, 16, 24]


@pytest.mark.slow
def test_an_extended_run_that_was_killed_goes_on_to_its_new_end(folder):
    path, killed = folder / "run", folder / "killed"
    trained(begun(path, "cosine", epochs=1, keep=9))
    before = lines(path)
    shutil.copytree(path, killed)
    run = resumed(path, "--epochs", "3", "--log-every", "1")
    assert "instead of 8 (1)" in run.extension
    after = lines(path)
    assert after[: len(before)] == before
    assert [x["step"] for x in after if x["kind"] == "train"] == list(range(1, 25))
    rates = [x["learning_rate"] for x in after if x["kind"] == "train"]
    # The rate falls, rises where the run was extended, and falls again.
    assert rates[7] < rates[8] > rates[16] > rates[23] > 0
    saved, _ = TrainConfig.load(path / CONFIG)
    assert saved == begun(path, "cosine", epochs=3, keep=9, run_dir=None)

    # As if the extended run had been killed in its third epoch, and resumed without --epochs.
    resumed(killed, "--epochs", "3")
    shutil.rmtree(killed / "checkpoints" / "24")
    assert resumed(killed).extension == ""
    assert lines(killed) == after
    with pytest.raises(UsageError, match="--epochs must be at least 3, got 2"):
        resumed(killed, "--epochs", "2")
    assert TrainConfig.load(killed / CONFIG)[0].epochs == 3


@pytest.mark.slow
def test_a_test_of_the_net_does_not_extend_its_run(folder):
    trained(begun(folder / "run", "constant", steps=2))
    before = (folder / "run" / CONFIG).read_bytes()
    options = ["--resume", "--run-dir", str(folder / "run"), "--eval-only", "--steps", "9"]
    run = set_up(parse(options))
    run.close()
    assert run.extension == ""
    assert (folder / "run" / CONFIG).read_bytes() == before
