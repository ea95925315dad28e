"""The training script as a user runs it: in a process of its own, to its files and exit code."""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from compilation import optimized
from flax import nnx
from PIL import Image
from settings import PARTS, config_of
from training_runs import AGAIN, finish, lines, run, run_well, started, steps_of_checkpoints

from alexnet.config import TrainConfig
from alexnet.errors import UsageError
from alexnet.model_io.weights import Weights, named_arrays
from alexnet.training.run import CONFIG, newest_run, set_up
from grouped_conv_jax.models import AlexNet

pytestmark = pytest.mark.training

RUN = ("--data", "folder:images", "--batch-size", 16, "--run-dir", "run")
"""Of 64 training images, so that an epoch has four steps."""


def said(accuracy_of: dict) -> str:
    return f"Test accuracy: {1 - accuracy_of['top1_error']:.2%}, top-5"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["shard_map", "jit"])
def test_a_step_is_compiled_for_a_tpu_that_is_not_there(tmp_path, cache, placement):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu")
    options = ("--compile-only", "v5e:2x2", "--placement", placement)
    shown = run_well(tmp_path, cache, *options)
    assert "compiled for 4 of the 4 devices of v5e:2x2 (TPU v5 lite); nothing was run." in shown
    assert "on a mesh of data 2 x group 2" in shown
    assert "FLOPs of each device, as XLA counts them: " in shown
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_topology_is_one_sentence(tmp_path, cache):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu")
    code, _, err = run(tmp_path, cache, "--compile-only", "v9:2x2")
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "there is no TPU topology 'v9:2x2'" in line
    assert "v5e:4x4" in line


def test_help_explains_every_option(tmp_path, cache):
    shown = run_well(tmp_path, cache, "--help")
    for part in (TrainConfig, *PARTS.values()):
        for field in dataclasses.fields(part):
            if field.name not in PARTS:
                assert f"--{field.name.replace('_', '-')}" in shown
    words = " ".join(shown.replace("│", " ").split())
    for phrase in (
        *("What to train on", "Towers that the net is cut into", "Go on from the newest"),
        *("--preset NAME (small, photos, paper", "--config FILE"),
    ):
        assert phrase in words


@pytest.mark.slow
@pytest.mark.parametrize(
    "elsewhere",
    [
        ("--log-every", 4),
        ("--mesh", 2, 1, "--placement", "pmap"),
        ("--mesh", 1, 1, "--placement", "jit"),
    ],
    ids=str,
)
def test_a_run_and_its_continuation(folder, cache, elsewhere):
    shown = run_well(folder, cache, *RUN, "--epochs", 2, "--log-every", 2)
    for text in ("data 1 x group 2", "cpu:0", "cpu:1", "50%", "learning_rate 0.02", "log_every 2"):
        assert text in shown
    assert "conv3  fprop        group  all-gather" in shown
    path = folder / "run"
    evaluations = lines(path, "eval")
    assert [line["epoch"] for line in evaluations] == [1, 2]
    assert [line["step"] for line in evaluations] == [4, 8]
    assert [line["step"] for line in lines(path, "train")] == [2, 4, 6, 8]
    assert said(evaluations[-1]) in shown
    saved = json.loads((path / CONFIG).read_text())
    assert saved["settings"]["towers"] is None
    assert saved["settings"]["recipe"]["batch_size"] == 16
    assert saved["classes"] == ["a", "b"]
    with Image.open(path / "filters.png") as image:
        assert np.ptp(np.asarray(image.convert("L"))) > 100
    assert "conv3" in (path / "placement.svg").read_text()

    # As if it had been killed in the second epoch, while it wrote the evaluation.
    newest = max((path / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    shutil.rmtree(newest)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "st')
    shown = run_well(folder, cache, *AGAIN, *elsewhere)
    if "--mesh" in elsewhere:
        assert f"data {elsewhere[1]} x group {elsewhere[2]}" in shown
    again = lines(path, "eval")
    assert [line["epoch"] for line in again] == [1, 2]
    assert again[0] == evaluations[0]
    assert again[1]["train_loss"] == pytest.approx(evaluations[1]["train_loss"], rel=1e-3)

    # Tested only, on the devices that it began on.
    before = contents(path)
    shown = run_well(folder, cache, *AGAIN, "--eval-only")
    assert said(again[-1]) in shown
    assert contents(path) == before
    for mistake, message in (
        ((*AGAIN, "--seed", 1), "the run to resume was started with --seed 0, not 1"),
        (("--run-dir", "run"), "run is not empty; go on with --resume"),
    ):
        code, _, err = run(folder, cache, *mistake)
        assert code == 2
        assert err.startswith(f"error: {message}")
        assert err.count("\n") == 1


@pytest.mark.slow
def test_weights_are_tested(folder, cache):
    config = config_of(data="folder:images").net_config(num_classes=2, image_channels=3)
    params = nnx.to_pure_dict(nnx.state(AlexNet(config, rngs=nnx.Rngs(0)), nnx.Param))
    # The second class is the answer to everything.
    params["classes"]["kernel"] *= 0
    params["classes_bias"] = np.array([0.0, 5.0])
    arrays = named_arrays(Weights(params, np.zeros(3), np.ones(3)))
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
    safetensors.numpy.save_file(arrays, folder / "net.safetensors")
    shown = run_well(folder, cache, *RUN, "--weights", "net.safetensors", "--eval-only")
    # A mean of log(1 + exp(-5)) and log(1 + exp(5)).
    assert "Test accuracy: 50.00%, top-5 100.00%, loss 2.5067." in shown
    assert not (folder / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_steps_end_within_an_epoch_and_programs_are_dumped_and_steps_profiled(folder, cache):
    shown = run_well(
        *(folder, cache, *RUN, "--steps", 6, "--dump-hlo", "--profile-steps", 3, 9),
        *("--checkpoint-every", 3, "--keep", 9),
    )
    path = folder / "run"
    assert [line["step"] for line in lines(path, "eval")] == [4, 6]
    assert said(lines(path, "eval")[-1]) in shown
    assert steps_of_checkpoints(path) == [0, 3, 4, 6]
    assert "stablehlo.all_gather" in (path / "train_step.stablehlo.txt").read_text()
    assert "all-gather" in (path / "train_step.hlo.txt").read_text()
    traces = list((path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000

    # A run that goes on has missed the first of the steps to record.
    for step in (4, 6):
        shutil.rmtree(path / "checkpoints" / str(step))
    shutil.rmtree(path / "profile")
    run_well(folder, cache, *AGAIN, "--profile-steps", 2, 5)
    assert len(list((path / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.slow
def test_the_input_is_measured_and_nothing_is_trained(folder, cache):
    shown = run_well(folder, cache, *RUN, "--profile-input", "--workers", 1, "--steps", 4)
    rates = [
        float(re.search(rf"{what} +(\d+\.\d)\n", shown)[1])  # pyright: ignore[reportOptionalSubscript]
        for what in ("read and decoded", "trained on", "both at once")
    ]
    assert min(rates) > 0
    # Both at once are no faster than either, apart from what else the machine does.
    assert rates[2] < 1.5 * min(rates[:2])
    assert "The limit is " in shown
    assert steps_of_checkpoints(folder / "run") == [0]
    assert not (folder / "run" / "metrics.jsonl").exists()
    # The next start trains.
    run_well(folder, cache, *AGAIN)
    assert [line["step"] for line in lines(folder / "run", "eval")] == [4]


@pytest.mark.slow
def test_a_run_stopped_at_once_goes_on(folder, cache):
    options = ("--data", "folder:images", "--epochs", 2, "--batch-size", 16)
    with started(folder, cache, *options) as process:
        for line in process.stdout:
            if line.startswith("Run folder: "):
                break
        process.send_signal(signal.SIGINT)
        code, _, err = finish(process)
    assert code == 130, err
    hint = re.search(r"stopped; go on with (--resume --run-dir \S+)\n", err)
    assert hint is not None, err
    run_well(folder, cache, *hint[1].split())
    (path,) = (folder / "runs").iterdir()
    done = lines(path, "eval")
    assert [line["epoch"] for line in done] == [1, 2]
    shown = run_well(folder, cache, "--resume")
    assert "All 8 steps were done before. A larger --epochs extends the run." in shown
    assert said(done[-1]) in shown
    shown = run_well(folder, cache, "--resume", "--epochs", 3)
    assert "The run now ends after 12 steps (3 epochs) instead of 8 (2). The next learning" in shown
    assert lines(path, "eval")[:2] == done
    assert [line["epoch"] for line in lines(path, "eval")] == [1, 2, 3]
    assert json.loads((path / CONFIG).read_text())["settings"]["epochs"] == 3
    code, _, err = run(folder, cache, "--resume", "--epochs", 1)
    assert (code, err) == (
        2,
        "error: the run has already done 12 steps (3 epochs), so --epochs must be at least 3, "
        "got 1\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--colur", "blue"], "Unrecognized options: --colur"),
        (["--mesh", 0, 2], "error: --mesh must be two numbers of at least 1, got (0, 2)"),
        (["--distributed"], "error: cannot meet the other processes in the cluster"),
    ],
)
def test_a_mistake_is_told_without_a_traceback_and_with_exit_code_2(
    tmp_path, cache, arguments, message
):
    code, _, err = run(tmp_path, cache, *arguments)
    assert code == 2, err
    assert message in " ".join(err.replace("│", " ").split())
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "cifar"}, '--data must be "digits", .*, got "cifar"'),
        ({"data": "folder:"}, '--data must be "digits", .*, got "folder:"'),
        ({"data": "folder:missing"}, "cannot read the folder missing: No such file"),
        ({"towers": 5}, r"towers=5 does not divide the features of conv1 \(32\)"),
        ({"towers": 64}, r"towers=64 does not divide the features of conv1 \(32\)"),
        ({"mesh": (3, 2)}, "a batch of 64 images does not divide over 3 devices"),
        ({"mesh": (2, 2), "accumulate": 64}, "does not divide over 2 devices in 64 parts"),
        ({"mesh": (1, 4)}, "2 towers cannot be shared by 4 devices"),
        ({"mesh": (3, 3)}, "a mesh of 3 x 3 needs 9 devices, there are 8"),
        ({"batch_size": 5000}, "a batch of 5000 is more than the 1438 training images"),
        ({"implementation": "magic"}, "unknown implementation 'magic'; known: xla, lax"),
        ({"weights": Path("none.npz")}, "cannot read the weights none.npz"),
        ({"run_dir": Path("file/below")}, "cannot make the run folder"),
    ],
    ids=str,
)
def test_what_a_run_cannot_start_with_is_refused(tmp_path, monkeypatch, values, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    config = config_of(**values)
    config.check()
    with pytest.raises(UsageError, match=message):
        set_up(config)
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_not_there_is_not_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="nothing to resume: no run in"):
        newest_run()
    for name in ("runs/first", "runs/second"):
        (tmp_path / name).mkdir(parents=True)
        config_of().save(tmp_path / name / CONFIG)
    (tmp_path / "runs" / "third").mkdir()
    os.utime(tmp_path / "runs" / "first" / CONFIG, (1, 1))
    assert newest_run() == Path("runs/second")


@pytest.mark.slow
def test_changed_images_and_damaged_checkpoints_are_not_resumed_from(folder, cache):
    run_well(folder, cache, *RUN, "--steps", 1)
    # A checkpoint whose error is not known any more may have a whole state.
    (metrics,) = (folder / "run" / "checkpoints").glob("*/metrics/metrics")
    metrics.write_bytes(metrics.read_bytes()[:3])
    shown = run_well(folder, cache, *AGAIN, "--eval-only")
    assert said(lines(folder / "run", "eval")[-1]) in shown
    for file in (folder / "run" / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:3])
    code, _, err = run(folder, cache, *AGAIN)
    assert code == 2
    assert re.match(r"error: cannot read the checkpoint .*checkpoints/1: .*", err)
    (folder / "images" / "c").mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(folder / "images" / "a" / name, folder / "images" / "c")
    code, _, err = run(folder, cache, *AGAIN)
    assert code == 2
    assert "the images of folder:images have changed since run began" in err


@pytest.mark.slow
def test_a_folder_of_images_is_trained_on_with_four_towers(folder, cache):
    shown = run_well(folder, cache, *RUN, "--towers", 4, "--mesh", 1, 2, "--epochs", 1)
    assert "1, 2" in shown
    assert "3, 4" in shown
    assert 0 <= lines(folder / "run", "eval")[-1]["top1_error"] <= 1


@pytest.mark.slow
def test_the_default_run_reaches_97_percent(tmp_path, cache):
    run_well(tmp_path, cache, env=optimized())
    (path,) = (tmp_path / "runs").iterdir()
    assert lines(path, "eval")[-1]["top1_error"] <= 0.03


@pytest.mark.slow
def test_the_photographs_are_told_apart(tmp_path, cache):
    run_well(tmp_path, cache, "--preset", "photos", "--epochs", 20, env=optimized())
    (path,) = (tmp_path / "runs").iterdir()
    assert lines(path, "eval")[-1]["top1_error"] <= 0.4
