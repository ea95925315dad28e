"""The benchmark: what it times is right, and what it writes is what it has timed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import benchmark
import jax
import numpy as np
import pytest

import grouped_conv_jax
from benchmarks import contenders, machine, measure, pytorch, rows, tables
from benchmarks.machine import Roofline
from benchmarks.picture import draw_picture, save_picture
from benchmarks.results import Ratios, Row, Run, Timing
from benchmarks.rows import TOLERANCES, Settings, compared, measured, prepared
from benchmarks.workloads import MADE, MODES, NAMED, TRANSPOSED, USED, WORKLOADS, Workload
from grouped_conv_jax import count_multiply_adds

NUMBERS = (2, 9, 8, 8, 12, 3, 2, 4)
TINY = Workload.of("tiny", NUMBERS)
UP = Workload.of("tiny_up", (2, 5, 4, 6, 12, 4, 2, 3), transposed=True)
ONCE = Settings(dtype="float32", turns=1, calls=1, budget=0.0)
ROOFLINE = Roofline(1e9, 1e9)

TORCH = [f"torch {name}" for name in pytorch.FORMATS] if pytorch.missing() is None else []


class FakeTime:
    """A clock that the contenders move on."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        pass


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(measure, "time", fake)
    return fake


class TestInterleaved:
    def contenders(self, clock, seconds):
        log = []

        def contender(name):
            def call():
                log.append(name)
                clock.now += seconds[name]

            return call

        return {name: contender(name) for name in seconds}, log

    def test_turns_begin_with_a_call_that_is_not_timed(self, clock):
        calls, log = self.contenders(clock, {"a": 1.0, "b": 2.0})
        times = measure.interleaved(calls, turns=2, calls=3, budget=100)
        assert log == ["a"] * 4 + ["b"] * 4 + ["a"] * 4 + ["b"] * 4
        assert times == {"a": [1.0] * 6, "b": [2.0] * 6}

    def test_short_calls_are_warmed_up_longer(self, clock):
        calls, log = self.contenders(clock, {"a": measure.WARM_UP / 3.5})
        times = measure.interleaved(calls, turns=1, calls=2, budget=100)
        assert len(log) == 4 + 2
        assert len(times["a"]) == 2

    def test_who_has_used_up_the_budget_is_not_called_again(self, clock):
        calls, log = self.contenders(clock, {"slow": 10.0, "fast": 0.5})
        times = measure.interleaved(calls, turns=3, calls=4, budget=5)
        assert times == {"slow": [10.0], "fast": [0.5] * 11}
        assert log.count("slow") == 2

    def test_once_without_a_budget(self, clock):
        calls, _ = self.contenders(clock, {"a": 1.0})
        assert measure.interleaved(calls, turns=3, calls=4, budget=0) == {"a": [1.0]}


@pytest.mark.parametrize("name", NAMED)
def test_workloads_are_what_the_library_makes_of_them(name):
    workload = NAMED[name]
    for mode in MODES:
        function = contenders.function(contenders.ours(None), workload, mode)
        operands = [jax.ShapeDtypeStruct(workload.shape(role), "float32") for role in USED[mode]]
        results = [x.shape for x in jax.eval_shape(function, *operands)]
        assert results == [workload.shape(role) for role in MADE[mode]]
        assert workload.flops(mode) == 2 * count_multiply_adds(function, *operands)
        sizes = [np.prod(shape) for shape in [*(x.shape for x in operands), *results]]
        assert workload.elements(mode) == sum(sizes)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=() if d == "float32" else pytest.mark.slow) for d in TOLERANCES],
)
@pytest.mark.parametrize("mode", MODES)
def test_all_contenders_compute_the_same(mode, dtype):
    # In each dtype they are compared by the tests of the library.
    names = grouped_conv_jax.implementations() if dtype == "float32" else ()
    settings = dataclasses.replace(ONCE, dtype=dtype, implementations=names)
    with jax.enable_x64(dtype == "float64"):
        found, left_out = prepared(TINY, mode, settings)
        errors = compared(found)
    expected = {"ours", "lax", *(f"ours:{name}" for name in names), *TORCH}
    assert {*found, *left_out} - {"torch"} == expected
    assert {"ours", "lax", *TORCH} <= {*found}
    assert max(errors.values()) <= TOLERANCES[dtype], errors


def test_all_contenders_compute_the_same_transposed():
    assert UP.out == (2, 10, 8, 12)
    names = grouped_conv_jax.implementations()
    settings = dataclasses.replace(ONCE, implementations=names)
    found, left_out = prepared(UP, "training", settings)
    assert {*found, *left_out} - {"torch"} == {"ours", "lax", *(f"ours:{n}" for n in names), *TORCH}
    assert {"ours", "lax", "ours:xla", *TORCH} <= {*found}
    assert max(compared(found).values()) <= TOLERANCES["float32"]
    assert found["ours"].implementations.keys() == {"fprop", "dgrad", "wgrad"}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_known_of_a_program(mode):
    found, _ = prepared(TINY, mode, ONCE)
    ours = found["ours"]
    contractions = ["fprop", "dgrad", "wgrad"] if mode == "training" else [mode]
    assert list(ours.implementations) == contractions
    assert {*ours.implementations.values()} <= {*grouped_conv_jax.implementations()}
    assert not found["lax"].implementations
    assert ours.compile_seconds
    assert ours.temporary_bytes is not None


def test_what_is_wrong_is_not_timed(monkeypatch):
    def twice(implementation):
        return lambda *args: contenders.by_lax(*args) * 2.0

    monkeypatch.setattr(rows, "ours", twice)
    row = measured(TINY, "fprop", ONCE, ROOFLINE)
    assert {*row.timings} == {"lax", *TORCH}
    assert row.left_out["ours"].startswith("wrong: ")
    assert row.roofline_fraction is None
    assert row.ratio("lax") is None


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_a_number_is_wrong(wrong):
    first, second = np.ones((2, 3)), np.ones(4)
    broken = np.array([1, 1, wrong, 1.0])
    made = {
        "lax": contenders.Contender(lambda: [first, second], list),
        "other": contenders.Contender(lambda: [first, broken], list),
        "another": contenders.Contender(lambda: [first, second[:3]], list),
    }
    errors = compared(made)
    assert errors["lax"] == 0
    assert not errors["other"] < 1
    assert not errors["another"] < 1


def test_what_is_not_implemented_is_left_out(monkeypatch):
    def ours(name):
        def conv(*args):
            if name == "vmap":
                raise NotImplementedError("it has no fprop")
            return contenders.by_lax(*args)

        return conv

    monkeypatch.setattr(rows, "ours", ours)
    settings = dataclasses.replace(ONCE, implementations=("xla", "vmap"))
    row = measured(TINY, "fprop", settings, ROOFLINE)
    assert row.left_out["ours:vmap"] == "it has no fprop"
    assert "ours:xla" in row.timings


def test_without_torch(monkeypatch):
    monkeypatch.setattr(pytorch, "is_installed", lambda: False)
    row = measured(TINY, "wgrad", ONCE, ROOFLINE)
    assert {*row.timings} == {"ours", "lax"}
    assert row.left_out == {"torch": "PyTorch is not installed"}
    assert row.timing("torch") is None
    assert row.ratio("torch") is None


def timing(median: float) -> Timing:
    return Timing(median, median, (median, median), 1, 0.0, 1.0, 0, {"fprop": "xla"})


def row(name: str, ours: float, lax: float, torch: float) -> Row:
    timings = {
        "ours": ours,
        "lax": lax,
        "torch contiguous": torch,
        "torch channels_last": 2 * torch,
    }
    return Row(
        workload=Workload.of(name, NUMBERS),
        mode="fprop",
        flops=1,
        array_bytes=1,
        roofline_seconds=0.001,
        roofline_fraction=0.001 / ours,
        timings={name: timing(median) for name, median in timings.items()},
        left_out={},
    )


def test_ratios():
    settings = {"dtype": "float32", "implementations": ()}
    run = Run({}, settings, ROOFLINE, [row("a", 1, 8, 0.5), row("b", 1, 2, 2)])
    about: Any = pytest.approx
    assert run.ratios("fprop", "lax") == Ratios(about(4), 2, "b")
    assert run.ratios("fprop", "torch") == Ratios(about(1), 0.5, "a")
    assert run.ratios("wgrad", "lax") is None
    assert run.rows[0].torch == "torch contiguous"
    assert "torch/ours: geometric mean 1.00, smallest 0.500 (a)" in tables.summary(run, "fprop")
    cells = dict(zip(tables.headings(run), tables.cells(run, run.rows[0]), strict=True))
    assert cells["lax ms"] == "8,000"
    assert cells["torch ms"] == "500"
    assert cells["lax/ours"] == "8.00"
    assert cells["implementation"] == "xla"


def test_a_run_and_what_it_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "SIZES", dict.fromkeys(machine.SIZES, (128, 2**16)))
    output, picture, markdown = (tmp_path / "a" / name for name in ("b.json", "b.svg", "b.md"))
    benchmark.main(
        f"--shape {' '.join(map(str, NUMBERS))} --turns 2 --calls 2 --implementations xla "
        f"--output {output} --picture {picture} --markdown {markdown}".split()
    )
    printed = capsys.readouterr().out
    saved = json.loads(output.read_text())
    assert saved["environment"]["jax"] == jax.__version__
    assert saved["environment"]["cores"] >= 1
    assert saved["settings"]["command"] == (
        "python examples/benchmark.py --shape 2 9 8 8 12 3 2 4 --implementations xla "
        "--turns 2 --calls 2"
    )
    assert min(saved["roofline"].values()) > 1e6
    assert [row["mode"] for row in saved["rows"]] == list(MODES)
    for row in saved["rows"]:
        assert row["workload"]["lhs"] == [2, 9, 8, 8]
        assert row["workload"]["rhs"] == [3, 3, 2, 12]
        assert {*row["timings"]} == {"ours", "lax", "ours:xla", *TORCH}
        assert row["roofline_fraction"] > 0
        for found in row["timings"].values():
            low, high = found["quartiles"]
            assert 0 < found["minimum"] <= low <= found["median"] <= high
            assert found["calls"] == 4
    assert "fprop" in picture.read_text()
    page = markdown.read_text()
    assert saved["settings"]["command"] in page
    for text in (printed, page):
        assert "xla ms" in text
        assert text.count("lax/ours: geometric mean") == len(MODES)

    def not_again(*args):
        raise AssertionError("measured once more")

    monkeypatch.setattr(benchmark, "measure", not_again)
    again = tmp_path / "again.md"
    benchmark.main(["--from", str(output), "--markdown", str(again)])
    assert again.read_text() == page
    shown = capsys.readouterr().out
    assert shown.partition("wrote")[0] in printed


def test_the_picture_has_all_bars(tmp_path):
    at = {"platform": "cpu", "cpu": "a CPU", "cores": 2, "jax": "1", "torch": None, "date": "2000"}
    found = [row("a", 1, 8, 0.5), row("b", 1, 2, 2)]
    found[1].timings.pop("lax")
    run = Run(at, {"dtype": "float32", "implementations": ()}, ROOFLINE, found)
    figure = draw_picture(run)
    (axes,) = figure.axes
    bars: list[Any] = list(axes.patches)
    assert sorted(bar.get_width() for bar in bars) == [500, 1000, 1000, 2000, 8000]
    for name in ("a.svg", "b.svg", "a.png"):
        save_picture(tmp_path / name, run)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_transposed_ones_are_told_apart(tmp_path):
    at = {"platform": "cpu", "cpu": "a CPU", "cores": 2, "jax": "1", "torch": None, "date": "2000"}
    found = dataclasses.replace(row("a", 1, 8, 0.5), workload=UP)
    run = Run(at, {"dtype": "float32", "implementations": (), "command": ""}, ROOFLINE, [found])
    run.save(tmp_path / "up.json")
    assert Run.load(tmp_path / "up.json").rows[0].workload == UP
    assert "`grouped_conv_transpose`" in tables.markdown(run)
    (axes,) = draw_picture(run).axes
    assert any("6 to 12, 4x4 up by 2, 3 groups" in text.get_text() for text in axes.texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--transposed --workloads up_dense", "--transposed is of --shape, or of all"),
        ("--transposed --shape 1 8 8 8 8 3 2 1", "larger than its stride by an even number, got 3"),
        ("--workloads alexnet", "unknown workload 'alexnet'; known: alexnet_conv2, "),
        ("--implementations fast", "unknown implementation 'fast'; known: xla, "),
        ("--shape 1 8 8 48 64 3 1 32", "feature_group_count=32 does not divide the input"),
        ("--shape 1 8 8 0 64 3 1 1", "numbers of at least 1, got (1, 8, 8, 0, 64, 3, 1, 1)"),
        ("--turns 0", "--turns must be at least 1, got 0"),
        ("--modes", "--modes must be at least one of fprop, dgrad, "),
        ("--picture a.jpg", "--picture must end in .svg or .png, got a.jpg"),
        (f"--output {Path(__file__)}/b.json", "File exists"),
        ("--from nothing.json", "nothing.json"),
        (f"--from {Path(__file__)}", "is not a result of this benchmark"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(arguments.split())
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err


def test_what_is_chosen():
    assert [w.name for w in benchmark.Options().chosen()] == list(WORKLOADS)
    assert len(benchmark.Options(quick=True).chosen()) == 3
    transposed = benchmark.Options(transposed=True)
    assert [w.name for w in transposed.chosen()] == list(TRANSPOSED)
    assert transposed.result_file == Path("benchmarks/cpu-transposed-float32.json")
    assert transposed.command == "python examples/benchmark.py --transposed"
    one = benchmark.Options(shape=(2, 5, 4, 6, 12, 4, 2, 3), transposed=True)
    assert one.chosen() == [dataclasses.replace(UP, name="shape")]
    named = benchmark.Options(workloads=("up_dense",))
    assert named.result_file == Path("benchmarks/cpu-transposed-float32.json")
    assert benchmark.Options(shape=NUMBERS).chosen() == [Workload.of("shape", NUMBERS)]
    assert len(benchmark.Options(shape=NUMBERS, workloads=("mobilenet_dw",)).chosen()) == 2
    everything = benchmark.Options(implementations=("all",)).settings()
    assert everything.implementations == grouped_conv_jax.implementations()


def test_something_wrong_is_an_error(tmp_path, monkeypatch):
    found = dataclasses.replace(row("a", 1, 8, 0.5), left_out={"ours": "wrong: 1.0 away from lax"})
    run = Run({}, {"dtype": "float32", "implementations": ()}, ROOFLINE, [found])
    run.save(tmp_path / "result.json")
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(["--from", str(tmp_path / "result.json")])
    assert exit_.value.code == 1
