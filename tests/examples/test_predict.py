"""A trained net put to use: a run's checkpoint and what is exported of it answer as in training."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import export_alexnet
import jax
import jax.numpy as jnp
import numpy as np
import optax
import predict
import pytest
import safetensors.numpy
from PIL import Image
from torch_alexnets import torch_alexnet

from alexnet.config import Devices, Recipe, TrainConfig, Work
from alexnet.data.sources import read_image
from alexnet.errors import UsageError
from alexnet.model_io import export, trained
from alexnet.model_io.weights import TORCHVISION, Weights, named_arrays
from alexnet.reports.metrics import MetricsLog
from alexnet.training.run import Run, set_up
from alexnet.training.trainer import answers
from grouped_conv_jax.models import ALEXNETS

EXAMPLES = Path(__file__).parents[2] / "examples"

BATCH = 8

PLATFORMS = ["cpu", "cuda", "rocm", "tpu"]


def new_run(folder: Path, data: str, mesh: tuple[int, int], **recipe) -> Run:
    return set_up(
        TrainConfig(
            data=data,
            steps=2,
            run_dir=folder,
            recipe=Recipe(batch_size=BATCH, **recipe),
            devices=Devices(mesh=mesh),
            work=Work(cache=None, tensorboard=False),
        )
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Run:
    """Grey images, a running mean, towers on two devices, and checkpoints of which one is best."""
    run = new_run(tmp_path_factory.mktemp("digits"), "digits", (1, 2), ema=0.9)
    with contextlib.closing(MetricsLog(run.folder, tensorboard=False, resumed_at=None)) as log:
        for step, error in ((1, 0.25), (2, 0.5)):
            # Not trained, which would be compiled: other numbers of the same kind.
            average = optax.tree.scale(1 - 0.1 * step, run.state.params)
            run.state = run.state._replace(step=jnp.int32(step), average=average)
            run.checkpoints.save(run.state, error)
            log.write("train", step, top1_error=0.0)
            log.write("eval", step, top1_error=error)
    run.close()
    return run


@pytest.fixture(scope="module")
def colour(tmp_path_factory) -> Run:
    """Colour images, of which the paper's mean image is subtracted, and ten crops."""
    folder = tmp_path_factory.mktemp("colour")
    run = new_run(folder, "synthetic:40", (1, 1), ten_crop=True, normalization="mean")
    run.close()
    return run


@pytest.fixture(scope="module")
def exported(digits, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "DIR"
    export.save(trained.of_run(digits.folder, "newest"), folder, PLATFORMS)
    return folder


def images_of(run: Run, count: int = BATCH) -> np.ndarray:
    return np.stack([run.dataset.test[i][0] for i in range(count)])


def answers_of(run: Run, params, images: np.ndarray) -> np.ndarray:
    """Probabilities in training, by the devices that the run has."""
    settings = {"size": run.net.image_size, "ten_crop": run.config.recipe.ten_crop}

    def by_example(net, images):
        return answers(net, images, run.trainer.preprocessing, **settings)

    log_odds = jax.jit(run.trainer.net.by_example(by_example, "shard_map"))(params, images)
    return np.exp(np.asarray(log_odds))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    # What logits of some tens lose in float32 is the relative error of a probability.
    np.testing.assert_allclose(found, expected, rtol=3e-4, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def save_images(folder: Path, images: np.ndarray) -> list[Path]:
    """As files from which the same pixels are read."""
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(np.squeeze(image)).save(path)
    return paths


def write_weights(path: Path, weights: Weights) -> None:
    arrays = {name: np.asarray(array) for name, array in named_arrays(weights).items()}
    safetensors.numpy.save_file(arrays, path)


def command(monkeypatch, capsys, main, *arguments) -> tuple[int, str, str]:
    """What a script ends with and says, run in this process."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


# Checkpoints.


@pytest.mark.slow
def test_the_running_mean_of_a_checkpoint_answers_as_in_training(digits):
    images = images_of(digits)
    model = trained.of_run(digits.folder, "newest")
    assert model.classes == tuple("0123456789")
    assert model.image_shape == (36, 36, 1)
    found = model(images)
    assert_close(found, answers_of(digits, digits.state.average, images))
    # The parameters themselves, and other images, have other answers.
    others = answers_of(digits, digits.state.params, images)
    assert np.abs(found - others).max() > 1e-3
    assert np.ptp(found, axis=0).max() > 1e-3


@pytest.mark.slow
def test_ten_crops_of_a_colour_image_answer_as_in_training(colour):
    images = images_of(colour)
    model = trained.of_run(colour.folder, "newest")
    assert model.image_shape == (36, 36, 3)
    assert model.ten_crop
    found = model(images)
    assert_close(found, answers_of(colour, colour.state.params, images))
    one_crop = dataclasses.replace(model, ten_crop=False)(images)
    assert np.abs(found - one_crop).max() > 1e-4


def test_checkpoints_are_chosen(digits):
    assert trained.of_run(digits.folder, "newest").origin == {"step": 2, "running_mean": True}
    best = trained.of_run(digits.folder, "best")
    assert best.origin["step"] == 1
    kernels = [trained.of_run(digits.folder, step).arrays["fc8.kernel"] for step in ("1", "2")]
    np.testing.assert_array_equal(best.arrays["fc8.kernel"], kernels[0])
    assert np.abs(kernels[1] - kernels[0]).max() > 0


def test_a_checkpoint_that_is_not_there(digits, colour, tmp_path):
    message = r'--checkpoint must be newest, best or one of (0, )?1, 2, got "7"'
    with pytest.raises(UsageError, match=message):
        trained.of_run(digits.folder, "7")
    with pytest.raises(UsageError, match="--checkpoint best: none of 0 was tested"):
        trained.of_run(colour.folder, "best")
    run = shutil.copytree(digits.folder, tmp_path / "run")
    # Found damaged before an array is read: of those that are, tensorstore tells by itself, too.
    (run / "checkpoints" / "2" / "state" / "_METADATA").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"cannot read the checkpoint .*2: "):
        trained.of_run(run, "newest")
    assert trained.of_run(run, "1").origin["step"] == 1
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UsageError, match=r"no checkpoint in .*checkpoints"):
        trained.of_run(run, "newest")


# Exported nets.


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, BATCH])
def test_an_exported_net_answers_as_its_run_for_batches_of_any_size(digits, exported, count):
    images = images_of(digits, count)
    assert_close(export.load(exported)(images), answers_of(digits, digits.state.average, images))


def test_an_exported_net_has_ten_crops(colour, tmp_path):
    export.save(trained.of_run(colour.folder, "newest"), tmp_path / "net", ["cpu"])
    images = images_of(colour)
    net = export.load(tmp_path / "net")
    assert net.classes == colour.dataset.classes
    assert_close(net(images), answers_of(colour, colour.state.params, images))
    assert json.loads((tmp_path / "net" / "model.json").read_text())["ten_crop"] is True


def test_what_an_exported_net_tells_of_itself(exported):
    facts = json.loads((exported / export.FACTS).read_text())
    assert facts["classes"] == list("0123456789")
    assert facts["image_shape"] == [36, 36, 1]
    assert facts["platforms"] == ["cpu", "cuda", "rocm", "tpu"]
    assert (facts["step"], facts["running_mean"]) == (2, True)
    assert "36 x 36 pixels" in facts["images"]
    program = jax.export.deserialize(bytearray((exported / export.PROGRAM).read_bytes()))
    assert program.platforms == tuple(facts["platforms"])
    # The weights are in their own file only.
    assert (exported / export.PROGRAM).stat().st_size < 0.1 * 4 * facts["parameters"]
    assert (exported / export.WEIGHTS).stat().st_size > 4 * facts["parameters"]


def test_an_exported_net_runs_without_this_package_by_the_lines_of_the_docstring(exported):
    assert export.__doc__ is not None
    lines = textwrap.dedent(re.findall(r"\n\n((?:    .*\n)+)", export.__doc__)[0])
    assert len(lines.splitlines()) > 9
    hidden = "import sys\nsys.modules |= dict.fromkeys(('grouped_conv_jax', 'alexnet', 'flax'))\n"
    ours = "\nprint(facts['classes'], probabilities.tolist())\n"
    result = subprocess.run(
        [sys.executable, "-P", "-c", hidden + lines + ours],
        cwd=exported.parent,
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    labels, numbers = result.stdout.splitlines()
    classes, _, found = numbers.partition("] ")
    found = np.array(json.loads(found), np.float32)
    assert classes + "]" == str(list("0123456789"))
    assert_close(found, export.load(exported)(np.zeros((5, 36, 36, 1), np.uint8)))
    assert labels == str([str(row.argmax()) for row in found])


@pytest.mark.parametrize("name", [export.PROGRAM, export.WEIGHTS, export.FACTS])
def test_a_damaged_export_is_told(exported, tmp_path, name):
    folder = shutil.copytree(exported, tmp_path / "net")
    (folder / name).write_bytes((folder / name).read_bytes()[:99])
    with pytest.raises(UsageError, match=r"cannot read the exported net in .*net: "):
        export.load(folder)


def test_an_export_for_another_machine_is_told(digits, tmp_path):
    export.save(trained.of_run(digits.folder, "newest"), tmp_path / "net", ["tpu", "cuda"])
    with pytest.raises(UsageError, match="exported for tpu, cuda, not for this machine's cpu"):
        export.load(tmp_path / "net")


# Published weights.


def test_published_weights_are_exported(monkeypatch, capsys, tmp_path, colour):
    model = trained.of_run(colour.folder, "newest")
    write_weights(tmp_path / "small.safetensors", model.weights)
    (tmp_path / "names.txt").write_text("\n".join(f"name {i}" for i in range(1000)) + "\n\n")
    options = ("--net", "small", "--classes", tmp_path / "names.txt", "--output", tmp_path / "DIR")
    code, out, _ = command(
        *(monkeypatch, capsys, export_alexnet.main),
        *("--weights", tmp_path / "small.safetensors", *options, "--platforms", "cpu"),
    )
    assert code == 0
    assert "AlexNet (small) of 1000 classes, for cpu: " in out
    net, images = export.load(tmp_path / "DIR"), images_of(colour)
    assert net.classes[7] == "name 7"
    assert_close(net(images), dataclasses.replace(model, ten_crop=False)(images))


def test_mistakes_with_published_weights(tmp_path, colour):
    weights = trained.of_run(colour.folder, "newest").weights
    path, names = tmp_path / "small.safetensors", tmp_path / "names.txt"
    write_weights(path, weights)
    for text, message in (
        ("a\nb\nc\n", r"small.safetensors: .*fc8.* is .*1000.*names.txt names 3 classes"),
        ("a\n\nc\n", "names.txt must name two classes or more, one in each line"),
        ("a\n", "names.txt must name two classes or more, one in each line"),
    ):
        names.write_text(text)
        with pytest.raises(UsageError, match=message):
            trained.of_weights(path, "small", names)
    write_weights(path, Weights(weights.params, None, None))
    names.write_text("\n".join(map(str, range(1000))))
    with pytest.raises(UsageError, match="does not say what its net does to pixels"):
        trained.of_weights(path, "small", names)
    with pytest.raises(UsageError, match=r"cannot read the classes in .*missing"):
        trained.of_weights(path, "small", tmp_path / "missing")


@pytest.mark.slow
def test_weights_of_torchvision_predict_as_in_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    torch_net = torch_alexnet(ALEXNETS["one-weird-trick"](num_classes=3))
    safetensors.save_file(torch_net.state_dict(), tmp_path / "alexnet.safetensors")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    model = trained.of_weights(
        tmp_path / "alexnet.safetensors", "one-weird-trick", tmp_path / "names.txt"
    )
    export.save(model, tmp_path / "net", ["cpu"])
    images = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), np.uint8)
    pixels = (images[:, 16:-16, 16:-16] - TORCHVISION[0]) / TORCHVISION[1]
    with torch.no_grad():
        logits = torch_net(torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)))
    expected = torch.softmax(logits, dim=1).numpy()
    for net in (model, export.load(tmp_path / "net")):
        np.testing.assert_allclose(net(images), expected, rtol=1e-4)


# The scripts.


def test_predictions_of_files(monkeypatch, capsys, tmp_path, digits, exported):
    """A checkpoint and its export: the same classes, in the order of their probabilities."""
    monkeypatch.setattr(predict, "BATCH", 3)
    images = images_of(digits, 7)
    paths = save_images(tmp_path, images)
    expected = answers_of(digits, digits.state.average, images)
    for model in (digits.folder, exported):
        code, out, err = command(
            *(monkeypatch, capsys, predict.main),
            *(*paths, "--model", model, "--top", 4, "--json"),
        )
        assert (code, err) == (0, "")
        lines = [json.loads(line) for line in out.splitlines()]
        assert [line["file"] for line in lines] == list(map(str, paths))
        for line, row in zip(lines, expected, strict=True):
            found = [(p["class"], p["probability"]) for p in line["predictions"]]
            order = np.argsort(-row)[:4]
            assert [label for label, _ in found] == [str(i) for i in order]
            np.testing.assert_allclose([p for _, p in found], row[order], rtol=3e-4)


def test_predictions_as_text(monkeypatch, capsys, tmp_path, digits):
    paths = save_images(tmp_path, images_of(digits, 2))
    arguments = (*paths, "--model", digits.folder, "--checkpoint", "best", "--top", 20)
    code, out, _ = command(monkeypatch, capsys, predict.main, *arguments)
    assert code == 0
    lines = out.splitlines()
    assert (lines[0], lines[11], len(lines)) == (str(paths[0]), str(paths[1]), 22)
    percent = [float(line.split("%")[0]) for line in lines[1:11]]
    assert percent == sorted(percent, reverse=True)
    assert sum(percent) == pytest.approx(100, abs=0.1)


def test_a_picture_of_another_size_and_colour_is_brought_to_the_net(
    monkeypatch, capsys, tmp_path, exported
):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.jpg")
    code, out, _ = command(
        *(monkeypatch, capsys, predict.main),
        *(tmp_path / "large.jpg", "--model", exported, "--top", 1, "--json"),
    )
    assert code == 0
    (found,) = json.loads(out)["predictions"]
    row = export.load(exported)(read_image(tmp_path / "large.jpg", 36, 1)[None])[0]
    assert (found["class"], found["probability"]) == (str(row.argmax()), pytest.approx(row.max()))


def test_files_that_cannot_be_read_are_named_and_the_others_go_on(
    monkeypatch, capsys, tmp_path, digits, exported
):
    (first, last) = save_images(tmp_path, images_of(digits, 2))
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(first.read_bytes()[:60])
    paths = (first, damaged, tmp_path / "missing.png", tmp_path, last)
    code, out, err = command(monkeypatch, capsys, predict.main, *paths, "--model", exported)
    assert code == 1
    assert [line for line in out.splitlines() if "%" not in line] == [str(first), str(last)]
    told = err.splitlines()
    assert [line.split(": ")[0] for line in told] == [f"cannot read {path}" for path in paths[1:4]]
    assert told[1].endswith("missing.png: No such file or directory")
    # None at all.
    code, out, err = command(monkeypatch, capsys, predict.main, damaged, "--model", exported)
    assert (code, out) == (2, "")
    assert err.splitlines()[1:] == ["error: none of the images can be read"]


def test_mistakes_of_predict(monkeypatch, capsys, tmp_path, exported):
    image = tmp_path / "image.png"
    for arguments, message in (
        (["--model", exported], "error: name at least one image"),
        ([image, "--model", exported, "--top", 0], "error: --top must be at least 1, got 0"),
        ([image, "--model", exported, "--checkpoint", 1], "error: --checkpoint is for a run; "),
        ([image, "--model", tmp_path], "error: --model must be the folder of a run (config.json)"),
        ([image, "--model", tmp_path / "none"], "error: --model must be the folder of a run"),
    ):
        code, out, err = command(monkeypatch, capsys, predict.main, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith(message), err
        assert len(err.splitlines()) == 1


def test_mistakes_of_export(monkeypatch, capsys, tmp_path, digits, exported):
    run, weights, names = ("--run-dir", digits.folder), ("--weights", "w.npz"), tmp_path / "names"
    new = ("--output", tmp_path / "new")
    for arguments, message in (
        ([*run, "--output", exported], f"{exported} exists and is not an empty folder"),
        (new, "take one of --run-dir and --weights"),
        ([*new, *run, *weights], "take one of --run-dir and --weights"),
        ([*new, *weights, "--net", "caffe"], "--weights needs --classes"),
        ([*new, *weights, "--classes", names], "--weights needs --net"),
        ([*new, *run, "--net", "small"], "--net is for --weights; a run knows its own"),
        ([*new, *weights, "--net", "small", "--classes", names, "--checkpoint", "best"],
         "--checkpoint is for --run-dir"),
        ([*new, "--run-dir", tmp_path], f"no settings in {tmp_path / 'config.json'}: No such"),
        ([*new, *run, "--platforms"], "name at least one of --platforms"),
    ):  # fmt: skip
        code, out, err = command(monkeypatch, capsys, export_alexnet.main, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {message}"), err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_scripts_as_a_user_runs_them(tmp_path, digits):
    paths = save_images(tmp_path, images_of(digits, 2))

    def run(script, *arguments):
        return subprocess.run(
            [sys.executable, EXAMPLES / script, *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    result = run("export_alexnet.py", "--run-dir", digits.folder, "--output", "net")
    assert (result.returncode, result.stderr) == (0, "")
    results = [run("predict.py", *paths, "--model", m) for m in (digits.folder, "net")]
    assert [result.returncode for result in results] == [0, 0]
    assert results[0].stdout == results[1].stdout
    for script in ("export_alexnet.py", "predict.py"):
        assert "--checkpoint newest|best|STEP" in run(script, "--help").stdout
    result = run("predict.py", *paths, "--model", "none")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --model must be")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_net_of_16_bits_is_exported(tmp_path, dtype):
    run = new_run(tmp_path / "run", "digits", (1, 1), dtype=dtype)
    run.close()
    images = images_of(run)
    model = trained.of_run(run.folder, "newest")
    export.save(model, tmp_path / "net", ["cpu"])
    expected = answers_of(run, run.state.params, images)
    for net in (model, export.load(tmp_path / "net")):
        found = net(images)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0.02)
