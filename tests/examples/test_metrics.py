"""What a run records survives a kill, and its curves show what was recorded."""

import json
import math
import struct
from pathlib import Path

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from alexnet.reports.curves import GREY, TEST, TRAIN, draw_curves, running_mean, save_curves
from alexnet.reports.metrics import MetricsLog, read_metrics


def log(folder: Path, resumed_at: int | None = None, *, tensorboard: bool = False) -> MetricsLog:
    return MetricsLog(folder, tensorboard=tensorboard, resumed_at=resumed_at)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder)]


def events(folder: Path) -> list:
    """Of TensorBoard, file by file; a record is its length, a checksum, the data, a checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_each_line_is_there_once_it_is_written(tmp_path):
    metrics = log(tmp_path)
    metrics.write("train", 1, loss=jnp.float32(2.5), top1_error=np.float32(0.5), epoch=1)
    expected: list[dict] = [
        {"kind": "train", "step": 1, "loss": 2.5, "top1_error": 0.5, "epoch": 1}
    ]
    assert read_metrics(tmp_path) == expected
    metrics.write("eval", 1, loss=2.0)
    metrics.close()
    expected.append({"kind": "eval", "step": 1, "loss": 2.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == expected
    # A count stays one.
    assert '"epoch": 1}' in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_what_is_not_a_number_is_valid_json(tmp_path):
    metrics = log(tmp_path)
    metrics.write("train", 1, loss=math.inf, top1_error=math.nan, learning_rate=0.1)
    metrics.close()

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["loss"] is None
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["loss"])
    assert math.isnan(read["top1_error"])
    assert read["learning_rate"] == 0.1


def test_a_run_without_lines(tmp_path):
    assert read_metrics(tmp_path) == []
    log(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_a_new_run_does_not_go_on_with_another_ones_numbers(tmp_path):
    log(tmp_path).close()
    with pytest.raises(FileExistsError):
        log(tmp_path)


@pytest.mark.parametrize(
    "torn", [b"", b'{"kind": "train", "step": 2, "lo', b'{"kind"', b"{", b"\x00\xff\xfe", b"12"]
)
def test_going_on_after_a_kill(tmp_path, torn):
    metrics = log(tmp_path)
    for step in range(1, 5):
        metrics.write("train", step, loss=float(step))
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert losses(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    metrics = log(tmp_path, resumed_at=2)
    assert losses(tmp_path) == [(1, 1.0), (2, 2.0)]
    metrics.write("train", 3, loss=30.0)
    metrics.close()
    assert losses(tmp_path) == [(1, 1.0), (2, 2.0), (3, 30.0)]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_last_line_without_its_end_is_not_joined_to_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}')
    metrics = log(tmp_path, resumed_at=1)
    metrics.write("train", 2, loss=2.0)
    metrics.close()
    assert losses(tmp_path) == [(1, 1.0), (2, 2.0)]


def test_a_kill_while_lines_are_dropped_loses_none(tmp_path, monkeypatch):
    metrics = log(tmp_path)
    metrics.write("train", 1, loss=1.0)
    metrics.write("train", 2, loss=2.0)
    metrics.close()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            log(tmp_path, resumed_at=1)
    assert losses(tmp_path) == [(1, 1.0), (2, 2.0)]
    log(tmp_path, resumed_at=1).close()
    assert losses(tmp_path) == [(1, 1.0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_going_on_before_anything_was_recorded(tmp_path):
    metrics = log(tmp_path, resumed_at=0)
    metrics.write("train", 1, loss=1.0)
    metrics.close()
    assert losses(tmp_path) == [(1, 1.0)]


def test_tensorboard_has_the_same_numbers_and_drops_the_later_ones(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = log(tmp_path, tensorboard=True)
    for step in range(1, 4):
        metrics.write("train", step, loss=float(step))
    metrics.close()
    metrics = log(tmp_path, resumed_at=2, tensorboard=True)
    metrics.write("eval", 3, loss=0.5, top1_error=0.25)
    metrics.close()
    # Within one second, and yet the second file has not taken the place of the first.
    found = events(tmp_path / "tensorboard")
    values = [
        (value.tag, event.step, value.simple_value)
        for event in found
        for value in event.summary.value
    ]
    assert values == [
        *[("train/loss", step, float(step)) for step in range(1, 4)],
        ("eval/loss", 3, 0.5),
        ("eval/top1_error", 3, 0.25),
    ]
    # TensorBoard forgets what it has from this step on.
    starts = [event.step for event in found if event.HasField("session_log")]
    assert starts == [3]


# The curves.


def a_run(steps: int = 100) -> list[dict]:
    found = []
    for step in range(1, steps + 1):
        noise = 0.3 * math.sin(7 * step)
        numbers = {"loss": 3 / step + 0.5 + noise, "top1_error": 1 / step, "learning_rate": 0.02}
        found.append({"kind": "train", "step": step, **numbers})
        if step % 25 == 0:
            numbers = {"loss": 1.0, "top1_error": 0.4, "top5_error": 0.1}
            found.append({"kind": "eval", "step": step, **numbers})
    return found


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def line(axes, label: str) -> np.ndarray:
    """Points of the line that the legend calls so, (2, N)."""
    (found,) = [x for x in axes.lines if x.get_label() == label]
    return np.array(found.get_data())


def pixels(path: Path, colour: str) -> int:
    """How many have very nearly this colour."""
    image = matplotlib.image.imread(path)[..., :3]
    return int(np.sum(np.abs(image - to_rgb(colour)).max(axis=-1) < 0.02))


def test_the_running_mean_against_its_definition():
    values = np.random.default_rng(0).normal(size=23)
    for reach in (0, 1, 4, 30):
        expected = [values[max(i - reach, 0) : i + reach + 1].mean() for i in range(23)]
        np.testing.assert_allclose(running_mean(values, reach), expected, atol=1e-12)


def test_the_curves_of_a_whole_run():
    metrics = a_run()
    loss, error, rate = draw_curves(metrics).axes
    assert labels(loss) == ["training", "test"]
    assert labels(error) == ["training top-1", "test top-1", "test top-5"]
    assert loss.get_ylabel() == "loss (nats per image)"
    assert error.get_ylabel() == "error (% of images)"
    assert (rate.get_ylabel(), rate.get_xlabel()) == ("learning rate", "step (batches)")
    np.testing.assert_array_equal(line(loss, "test"), [[25, 50, 75, 100], [1.0] * 4])
    np.testing.assert_array_equal(line(error, "test top-5")[1], [0.1] * 4)
    train = [record["loss"] for record in metrics if record["kind"] == "train"]
    faint, mean = loss.lines[0].get_data(), line(loss, "training")
    np.testing.assert_array_equal(faint, [range(1, 101), train])
    np.testing.assert_allclose(mean[1], running_mean(np.array(train), 1))
    # Nothing that was recorded is outside.
    assert loss.get_ylim()[1] > max(train)
    assert loss.get_xlim()[1] > 100
    assert error.yaxis.get_major_formatter()(0.4) == "40"


def test_the_curves_are_drawn(tmp_path):
    path = tmp_path / "curves.png"
    save_curves(path, a_run())
    assert min(pixels(path, colour) for colour in (TRAIN, TEST, GREY)) > 200
    save_curves(path, [record for record in a_run() if record["kind"] == "train"])
    assert pixels(path, TRAIN) > 200
    assert pixels(path, TEST) == 0


def test_the_scale_of_the_learning_rate():
    def scale(*rates: float) -> str:
        records = [
            {"kind": "train", "step": i, "learning_rate": rate} for i, rate in enumerate(rates, 1)
        ]
        return draw_curves(records).axes[2].get_yscale()

    assert scale(0.01, 0.01) == "linear"
    assert scale(0.01, 0.002) == "linear"
    assert scale(0.01, 0.001, 0.0001) == "log"
    # A warm-up from 0 has no logarithm there.
    assert scale(0.0, 0.01) == "linear"
    assert scale(0.0, 0.0) == "linear"
    assert scale(0.0, 1e-4, 0.01, 0.0) == "log"


def test_curves_of_one_line_or_none(tmp_path):
    path = tmp_path / "curves.png"
    save_curves(path, [{"kind": "train", "step": 1, "loss": 2.0}])
    assert pixels(path, TRAIN) > 20
    assert labels(draw_curves([{"kind": "eval", "step": 5, "loss": 2.0}]).axes[0]) == ["test"]
    save_curves(path, [])
    assert pixels(path, TRAIN) == pixels(path, TEST) == 0


def test_curves_leave_out_what_is_not_a_number(tmp_path):
    records = [
        {"kind": "train", "step": 1, "loss": 2.0},
        {"kind": "train", "step": 2, "loss": math.nan},
        {"kind": "train", "step": 3, "loss": 1.0},
    ]
    np.testing.assert_array_equal(line(draw_curves(records).axes[0], "training"), [[1, 3], [2, 1]])
    save_curves(tmp_path / "curves.png", [{"kind": "train", "step": 1, "loss": math.nan}])
