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

from alexnet.config import TrainConfig
from alexnet.errors import UsageError
from alexnet.reports.metrics import read_metrics
from alexnet.training.extension import extension
from alexnet.training.loop import Loop
from alexnet.training.run import CONFIG, Run, set_up
from alexnet.training.stopping import Stop

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


LONGER = (
    "The run now ends after 88 steps (22 epochs) instead of 80 (20). The next learning rate is "
)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"schedule": "constant"}, "0.1, as before."),
        ({"schedule": "plateau"}, "0.1, as before."),
        ({"schedule": "steps", "drop_epochs": (10.0, 19.0)}, "0.001, as before."),
        # A drop after the old end takes place where it was asked for.
        ({"schedule": "steps", "drop_epochs": (10.0, 21.0)}, "0.01, as before."),
        # 0.05 (1 + cos(80 pi / 88)).
        (
            {"schedule": "cosine"},
            "0.002025, instead of 0; the cosine falls to 0 at the new end.",
        ),
        # Half of the steps limit the warm-up: 44 instead of 40 steps.
        ({"schedule": "constant", "warmup_epochs": 30.0}, "0.1, as before."),
    ],
    ids=str,
)
def test_the_learning_rate_of_a_longer_run_is_told(settings, rate):
    assert extended({"epochs": 20}, {"epochs": 22}, 80, **settings) == LONGER + rate


def test_the_plateaus_factor_is_part_of_the_learning_rate():
    settings: dict[str, Any] = {"schedule": "plateau", "learning_rate": 0.1, "warmup_epochs": 0.0}
    longer = [config_of(epochs=epochs, **settings) for epochs in (20, 22)]
    said = extension(longer[0], longer[1], done=80, steps_per_epoch=4, scale=0.01)
    assert said == f"{LONGER}0.001, as before."


@pytest.mark.parametrize(
    ("before", "now", "done", "expected"),
    [
        ({"epochs": 5}, {"epochs": 5}, 20, ""),
        ({"epochs": 5}, {"steps": 20}, 20, ""),
        ({"epochs": 20}, {"epochs": 15}, 60, "after 60 steps (15 epochs) instead of 80 (20), "),
        ({"epochs": 20}, {"epochs": 16}, 60, "after 64 steps (16 epochs) instead of 80 (20). The "),
        ({"steps": 6}, {"steps": 11}, 6, "after 11 steps (2.75 epochs) instead of 6 (1.5). The "),
        # In the warm-up, which would have been of 4 steps and is one of 8.
        ({"epochs": 2}, {"epochs": 4}, 3, "rate is 0.0375, instead of 0.075."),
    ],
    ids=str,
)  # fmt: skip
def test_lengths_are_told(before, now, done, expected):
    found = extended(before, now, done, warmup_epochs=2.0, schedule="constant")
    assert expected in found if expected else found == ""


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"epochs": 10}, r"the run has already done 60 steps \(15 epochs\), so --epochs must be at "
         "least 15, got 10"),
        ({"steps": 59}, r"the run has already done 60 steps \(15 epochs\), so --steps must be at "
         "least 60, got 59"),
    ],
    ids=str,
)  # fmt: skip
def test_a_run_does_not_become_shorter_than_what_is_done(now, message):
    with pytest.raises(UsageError, match=message):
        extended({"epochs": 20}, now, 60)


def begun(folder: Path, schedule: str, **settings: Any) -> TrainConfig:
    """The settings of a run on one device."""
    return config_of(
        **{
            "data": f"folder:{folder.parent / 'images'}",
            "run_dir": folder,
            "batch_size": 8,
            "mesh": (1, 1),
            "log_every": 1,
            "learning_rate": 0.01,
            "schedule": schedule,
            **settings,
        }
    )


def trained(config: TrainConfig) -> Run:
    """A run to its end."""
    run = set_up(config)
    assert Loop(run, Console(quiet=True), Stop()).train()
    run.close()
    return run


def resumed(folder: Path, *options: str) -> Run:
    return trained(parse(["--resume", "--run-dir", str(folder), *options]))


def numbers(folder: Path) -> list[dict[str, Any]]:
    """All that was logged, but for the speed."""
    return [
        {k: v for k, v in line.items() if "per_second" not in k and "flop" not in k}
        for line in read_metrics(folder)
    ]


@pytest.mark.slow
def test_a_run_extended_is_the_longer_run_bit_for_bit(folder):
    whole, short = folder / "whole", folder / "short"
    trained(begun(whole, "constant", epochs=3))
    trained(begun(short, "constant", epochs=2))
    assert numbers(short) == numbers(whole)[: len(numbers(short))]
    resumed(short, "--epochs", "3")
    assert numbers(short) == numbers(whole)
    assert [x["step"] for x in numbers(short) if x["kind"] == "eval"] == [8, 16, 24]


@pytest.mark.slow
def test_an_extended_run_that_was_killed_goes_on_to_its_new_end(folder):
    path, killed = folder / "run", folder / "killed"
    trained(begun(path, "cosine", epochs=1, keep=9))
    before = numbers(path)
    shutil.copytree(path, killed)
    run = resumed(path, "--epochs", "3", "--log-every", "1")
    assert "instead of 8 (1)" in run.extension
    assert "the cosine falls to 0 at the new end" in run.extension
    after = numbers(path)
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
    assert numbers(killed) == after
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
