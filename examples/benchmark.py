"""Times grouped convolutions by this library, by lax and, where it is installed, by PyTorch.

python examples/benchmark.py
python examples/benchmark.py --quick
python examples/benchmark.py --transposed
python examples/benchmark.py --shape 8 56 56 128 128 3 1 32 --implementations all
python examples/benchmark.py --from benchmarks/cpu-float32.json --picture benchmark.svg
python examples/benchmark.py --help
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import machine, pytorch, tables
from benchmarks.picture import SUFFIXES, save_picture
from benchmarks.results import WRONG, Run
from benchmarks.rows import Settings, measured
from benchmarks.workloads import MODES, NAMED, QUICK, TRANSPOSED, WORKLOADS, Mode, Workload
from grouped_conv_jax import implementations
from grouped_conv_jax.algorithms import table

WIDE = 300
"""Columns of the terminal that a table may take; words cut short would be worse."""

BUSY = 0.5
"""A load average above which the cores are not this program's alone."""

Eight = tuple[int, int, int, int, int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Options:
    """Times grouped convolutions by this library, by lax and, where it is installed, by PyTorch.

    Without arguments: all workloads but the transposed ones and all modes, in float32, which takes
    some minutes on two cores, mostly lax's kernel gradients.
    """

    # In the help every line of a text stands by itself, so each is a sentence.

    workloads: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Which convolutions to time, by name; by default all but the transposed ones."""

    transposed: bool = False
    """The transposed ones, or that --shape is one: upsampling, padded by half of K - STRIDE."""

    shape: Annotated[Eight | None, tyro.conf.arg(metavar="N H W CIN COUT K STRIDE G")] = None
    """One convolution of your own, padded by half of the kernel."""

    batch: int | None = None
    """Examples in each of the named ones; by default as many as a CPU has enough of, 4 to 16."""

    modes: tuple[Mode, ...] = MODES
    """What to compute: the output, the gradients, or all three at once."""

    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of all arrays."""

    implementations: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Implementations to time by name as well, or "all"; they are left out where they do not go."""

    turns: int = 5
    """How often each contender's turn comes."""

    calls: int = 5
    """Timed calls in a turn."""

    budget: float = 1.0
    """Seconds of timed calls after which a contender is not called again in a row."""

    in_flight: int | None = None
    """Calls that are started before they are waited for; 1 on a CPU, 20 elsewhere."""

    quick: bool = False
    """A glance: three workloads, unless others are asked for, and fewer calls."""

    output: Path | None = None
    """The result file, JSON; by default benchmarks/PLATFORM[-transposed]-DTYPE.json."""

    picture: Path | None = None
    """Draw the result to this file, .svg or .png."""

    markdown: Path | None = None
    """Write the tables to this file."""

    from_: Annotated[Path | None, tyro.conf.arg(name="from", metavar="FILE")] = None
    """Measure nothing, but show, draw and write what is in this result file."""

    def chosen(self) -> list[Workload]:
        """The convolutions to time.

        Raises:
          ValueError: there is no such convolution.
        """
        for name in self.workloads:
            if name not in NAMED:
                raise ValueError(f"unknown workload {name!r}; known: {', '.join(NAMED)}")
        own = [Workload.of("shape", self.shape, self.transposed)] if self.shape else []
        all_ = TRANSPOSED if self.transposed else QUICK if self.quick else WORKLOADS
        if self.transposed and self.workloads:
            raise ValueError("--transposed is of --shape, or of all; the names say it themselves")
        names = self.workloads or (() if own else all_)
        named = [NAMED[name] for name in dict.fromkeys(names)]
        return [w if self.batch is None else w.with_batch(self.batch) for w in named] + own

    def settings(self) -> Settings:
        """How to time them.

        Raises:
          ValueError: an option is wrong.
        """
        for name in self.implementations:
            table.parsed(None if name == "all" else name)
        in_flight = self.in_flight
        if in_flight is None:
            in_flight = 1 if jax.default_backend() == "cpu" else 20
        for name, value in {
            "turns": self.turns,
            "calls": self.calls,
            "in-flight": in_flight,
            "batch": 1 if self.batch is None else self.batch,
        }.items():
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if not self.modes:
            raise ValueError(f"--modes must be at least one of {', '.join(MODES)}")
        return Settings(
            dtype=self.dtype,
            turns=min(self.turns, 2) if self.quick else self.turns,
            calls=min(self.calls, 3) if self.quick else self.calls,
            budget=min(self.budget, 0.2) if self.quick else self.budget,
            implementations=(
                implementations() if "all" in self.implementations else self.implementations
            ),
            in_flight=in_flight,
        )

    def make_folders(self) -> None:
        """Of all files to write, before it takes minutes to have something to write.

        Raises:
          ValueError: there is no such picture.
          OSError: there can be no such folder.
        """
        if self.picture and self.picture.suffix not in SUFFIXES:
            raise ValueError(f"--picture must end in {' or '.join(SUFFIXES)}, got {self.picture}")
        for path in (self.result_file, self.picture, self.markdown):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def result_file(self) -> Path:
        """To read or to write."""
        if given := self.from_ or self.output:
            return given
        which = "-transposed" if any(w.transposed for w in self.chosen()) else ""
        return Path("benchmarks") / f"{jax.default_backend()}{which}-{self.dtype}.json"

    @property
    def command(self) -> str:
        """That measures the same again."""
        words = ["python examples/benchmark.py"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default or field.name in ("output", "picture", "markdown", "from_"):
                continue
            words.append(f"--{field.name.replace('_', '-')}")
            if value is not True:
                words.extend(map(str, value if isinstance(value, tuple) else (value,)))
        return " ".join(words)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 1 if a contender has computed something wrong."""
    options = tyro.cli(Options, args=arguments)
    console = Console(soft_wrap=True)
    try:
        run = Run.load(options.result_file) if options.from_ else None
        workloads, settings = options.chosen(), options.settings()
        options.make_folders()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if run is None:
        # Seconds of compilation are not those of reading a file.
        jax.config.update("jax_enable_compilation_cache", False)
        modes = tuple(dict.fromkeys(options.modes))
        run = measure(workloads, modes, settings, options, console)
        console.print(f"wrote {options.result_file}")
    for mode in run.modes:
        Console(width=WIDE).print(tables.table(run, mode))
    for note in tables.left_out(run):
        console.print(note)
    if options.markdown:
        options.markdown.write_text(tables.markdown(run))
        console.print(f"wrote {options.markdown}")
    if options.picture:
        save_picture(options.picture, run)
        console.print(f"wrote {options.picture}")
    if any(reason.startswith(WRONG) for row in run.rows for reason in row.left_out.values()):
        sys.exit(1)


def measure(
    workloads: Sequence[Workload],
    modes: Sequence[Mode],
    settings: Settings,
    options: Options,
    console: Console,
) -> Run:
    """All rows, with a progress bar; the result file has them as soon as they are there."""
    environment = machine.environment()
    if (load := environment["load_average"]) and load > BUSY:
        console.print(f"other programs are running (load average {load:.1f}): times will be long")
    if pytorch.missing() is None:
        pytorch.use_cores(machine.cores())
    with (
        jax.enable_x64(settings.dtype == "float64"),
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):
        bar = progress.add_task("roofline", total=len(workloads) * len(modes))
        roofline = machine.roofline(settings.dtype)
        how = {
            **dataclasses.asdict(settings),
            "command": options.command,
            "rows": len(workloads) * len(modes),
        }
        run = Run(environment, how, roofline, [])
        for workload in workloads:
            for mode in modes:
                progress.update(bar, description=f"{workload.name} {mode}")
                run.rows.append(measured(workload, mode, settings, roofline))
                run.save(options.result_file)
                progress.advance(bar)
    return run


if __name__ == "__main__":
    main()
