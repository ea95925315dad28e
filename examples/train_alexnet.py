"""Trains the two-tower AlexNet of 2012 on real images, its towers on different devices.

python examples/train_alexnet.py
python examples/train_alexnet.py --preset photos
python examples/train_alexnet.py --preset paper --data folder:DIR
python examples/train_alexnet.py --compile-only v5e:4x4
python examples/train_alexnet.py --help
"""

import contextlib
import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from alexnet.config import TrainConfig
from alexnet.data.augmentation import Preprocessing
from alexnet.errors import RunError, UsageError
from alexnet.model_io.checkpoints import CANNOT_WRITE
from alexnet.presets import PRESETS
from alexnet.reports.brevity import be_brief
from alexnet.reports.picture import save_placement
from alexnet.reports.report import dump_programs, show_placement, training_report
from alexnet.training import distributed
from alexnet.training.input_profile import profile_input
from alexnet.training.loop import Loop, evaluate
from alexnet.training.run import (
    CONFIG,
    Run,
    load,
    new_trainer,
    newest_run,
    set_up,
    user_errors,
    warn,
)
from alexnet.training.speed import counting_compilations
from alexnet.training.state import Evaluation
from alexnet.training.stopping import Stop, on_sigterm
from alexnet.training.topology import topology_devices
from alexnet.training.trainer import Trainer
from grouped_conv_jax.towers import make_mesh

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C has ended."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What the defaults of the other options are."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}")] = None
    """Settings by name, by default "small"; what is given besides is changed."""

    config: Path | None = None
    """Settings from a file that a run has written, its config.json, instead of a preset."""


def main() -> None:
    """The command line."""
    code = 0
    be_brief()
    try:
        config = parse(sys.argv[1:])
        with user_errors():
            towers = config.net_config(num_classes=2, image_channels=3).towers
        if cpus := config.devices.cpu_devices(towers):
            jax.config.update("jax_num_cpu_devices", cpus)
        if config.devices.compile_only is not None:
            compile_only(config, config.devices.compile_only)
            sys.exit()
        use_cache(config.work.cache)
        with distributed.joined(config) as process, counting_compilations() as compilations:
            code = train_in(process, config)
            if distributed.is_first():
                print(
                    f"Programs compiled: {compilations.compiled}, in {compilations.seconds:.0f} s; "
                    f"from the cache: {compilations.from_cache}."
                )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error.__cause__, OSError):
            # What else writes in the background fails too, each with a traceback at the exit.
            sys.stdout.flush()
            os._exit(1)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped before there was anything to go on from", file=sys.stderr)
        # A usual exit may crash after a compilation that was interrupted.
        sys.stdout.flush()
        os._exit(INTERRUPTED)
    sys.exit(code)


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The settings: those of a preset, a file or a run to go on with, and what is given besides.

    Raises:
      UsageError: they cannot be had or do not go together.
    """
    asked = any(argument in ("-h", "--help") for argument in arguments)
    start, others = tyro.cli(Start, args=list(arguments), return_unknown_args=True, add_help=False)
    preset = start.preset or "small"
    if preset not in PRESETS:
        nearest = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0)[0]
        raise UsageError(f"unknown --preset {preset}; the nearest is {nearest}")
    if start.preset and start.config:
        raise UsageError("--preset and --config exclude each other: both say what is the default")
    default = TrainConfig.load(start.config)[0] if start.config else PRESETS[preset]
    config = _parse_settings(others, default)
    if config.resume and not asked:
        if start.preset or start.config:
            raise UsageError("--resume goes on with the settings of its run: no --preset, --config")
        # Once more, with the settings of that run as the defaults.
        folder = config.run_dir or newest_run()
        saved = dataclasses.replace(
            TrainConfig.load(folder / CONFIG)[0], run_dir=folder, resume=True
        )
        config = _parse_settings(others, saved)
        config.check_same_as(saved)
    config.check()
    return config


def _parse_settings(arguments: Sequence[str], default: TrainConfig) -> TrainConfig:
    return tyro.cli(
        TrainConfig,
        args=list(arguments),
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),
        description=f"{TrainConfig.__doc__}\n\nBefore all of these: --preset NAME "
        f"({', '.join(PRESETS)}), or --config FILE with the config.json of a run, for other "
        "defaults.",
    )


def use_cache(folder: Path | None) -> None:
    """Keeps compiled programs, so that the next start with the same settings compiles nothing."""
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.expanduser() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Under plain jit a program has a pointer in it, which differs from start to start.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)


def compile_only(config: TrainConfig, topology: str) -> None:
    """Compiles a training step for a TPU topology and prints what each device does in it.

    Raises:
      UsageError: the settings do not fit the topology, or it cannot be compiled for.
    """
    jax.config.update("jax_platforms", "cpu")  # Whatever else there is, nothing runs on it.
    try:
        devices = topology_devices(topology)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--compile-only: {error}") from error
    mesh, dataset, net = load(config, devices)
    # The statistics of the images are constants of the program: their values do not matter.
    trainer = new_trainer(config, dataset, net, mesh, Preprocessing.neutral(dataset.channels))
    try:
        compiled = trainer.lower(config.recipe.batch_size, dataset.train.shape).compile()
    except NotImplementedError as error:
        raise UsageError(f"--implementation: {error}") from error
    report = training_report(
        trainer,
        net,
        trainer.abstract_state,
        config.recipe.batch_size,
        dataset.train.shape,
        dtype=config.recipe.dtype,
        parts=config.recipe.accumulate,
        compiled=compiled,
    )
    console = Console(soft_wrap=True)
    console.print(
        f"AlexNet ({config.net}), compiled for {mesh.size} of the {len(devices)} devices of "
        f"{topology} ({devices[0].device_kind}); nothing was run.",
        highlight=False,
    )
    console.print(str(report), markup=False, highlight=False)
    if analysis := compiled.cost_analysis():
        console.print(f"FLOPs of each device, as XLA counts them: {analysis['flops']:,.0f}")


def train_in(process: distributed.Process | None, config: TrainConfig) -> int:
    """Trains, from the beginning or on; in this process alone or as one of several.

    Returns:
      The exit code.
    """
    run = set_up(config, warn)
    console = Console(soft_wrap=True, quiet=not distributed.is_first())
    way_back = f"--resume --run-dir {run.folder}"
    if process:
        process.way_back = way_back
    try:
        with on_sigterm() as stop:
            work_on(run, console, stop, way_back)
            run.close()
    except BaseException as error:
        # Of several processes those that are left cannot complete what they are saving.
        if process is None or isinstance(error, RunError):
            # One error is enough: if this fails too, it is for the same reason.
            with contextlib.suppress(RunError):
                run.close()
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise RunError(
                f"cannot write to {run.folder}: {error.strerror}; the last whole checkpoint is "
                f"{run.checkpoints.newest}"
            ) from error
        if process is None and isinstance(error, KeyboardInterrupt):
            print(f"stopped; go on with {way_back}", file=sys.stderr)
            return INTERRUPTED
        raise
    return 0


def work_on(run: Run, console: Console, stop: Stop, way_back: str) -> None:
    """What the settings ask for: to train, to test or to measure."""
    describe(run, console)
    if run.config.eval_only:
        show_result(run, console, evaluate(run))
    elif run.config.work.profile_input:
        console.print(profile_input(run), highlight=False)
    elif (loop := Loop(run, console, stop)).train():
        show_result(run, console, loop.tested or evaluate(run))
        console.print(f"All of it is in {run.folder}")
    else:
        console.print(f"Asked to stop: all is saved after step {int(run.state.step)}.")
        console.print(f"Go on with {way_back}")


def show_result(run: Run, console: Console, tested: Evaluation) -> None:
    """Says how good the net is."""
    console.print(
        f"Test accuracy: {tested.top1:.2%}, top-5 {tested.top5:.2%}, loss {tested.loss:.4f}.",
        highlight=False,
    )
    if run.damage.names:
        console.print(f"Damaged images: {len(run.damage.names)}.")


def describe(run: Run, console: Console) -> None:
    """Shows what is about to be trained, and where it lives."""
    mesh, config = run.trainer.net.mesh, run.config
    parameters = sum(array.size for array in jax.tree.leaves(run.state.params))
    console.print(
        f"AlexNet ({config.net}): {run.net.towers} towers, {parameters:,} parameters. "
        f"{config.data}: {len(run.dataset.train):,} training and {len(run.dataset.test):,} "
        f"test images of {len(run.dataset.classes)} classes."
    )
    console.print(settings(config), markup=False, highlight=False)
    show_placement(console, mesh, run.net.towers, run.state.params)

    def alone() -> Trainer:
        # Compiled to compare the memory with; a device of this process, which can.
        own = make_mesh(1, 1, jax.local_devices())
        return new_trainer(config, run.dataset, run.net, own, run.trainer.preprocessing)

    if not config.eval_only:
        report = training_report(
            run.trainer,
            run.net,
            run.state,
            run.batch_size,
            run.image_shape,
            dtype=config.recipe.dtype,
            parts=config.recipe.accumulate,
            alone=alone if mesh.size > 1 and distributed.is_first() else None,
        )
        if config.recipe.accumulate > 1:
            console.print(f"Of each of the {config.recipe.accumulate} parts of a batch:")
        console.print(str(report), markup=False, highlight=False)
    if distributed.is_first():
        if not config.eval_only:
            save_placement(run.folder / "placement.svg", mesh, run.net)
        if config.work.dump_hlo:
            dump_programs(run.folder, run.trainer, run.batch_size, run.image_shape)
    if run.extension:
        console.print(run.extension, highlight=False)
    console.print(f"Run folder: {run.folder}")


def settings(config: TrainConfig) -> str:
    """Every setting, in a line for each part."""
    lines = []
    for part in (config, config.recipe, config.devices, config.work):
        shown = [
            f"{name} {value}"
            for name, value in vars(part).items()
            if not dataclasses.is_dataclass(value)
        ]
        lines.append(f"{type(part).__name__}: {', '.join(shown)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
