"""Trains the two-tower AlexNet of 2012 on real images, its towers on different devices.

python examples/train_alexnet.py
python examples/train_alexnet.py --preset photos
python examples/train_alexnet.py --preset paper --data folder:DIR
python examples/train_alexnet.py --compile-only v5e:4x4
python examples/train_alexnet.py --help
"""

import dataclasses
import difflib
import logging
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from alexnet.config import TrainConfig
from alexnet.data.augmentation import Preprocessing
from alexnet.errors import RunError, UsageError
from alexnet.model_io.checkpoints import CANNOT_WRITE
from alexnet.presets import PRESETS
from alexnet.reports.placement_picture import save_placement
from alexnet.reports.placement_report import dump_programs, show_placement, training_report
from alexnet.topology import topology_devices
from alexnet.training import processes
from alexnet.training.input_profile import profile_input
from alexnet.training.loop import Loop, evaluate
from alexnet.training.run import CONFIG, Run, load, new_trainer, newest_run, set_up, user_errors
from alexnet.training.state import Evaluation
from alexnet.training.trainer import Trainer
from grouped_conv_jax.towers import make_mesh

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C has ended."""


@dataclasses.dataclass(frozen=True)
class Start:
    """The source of the defaults of the other options."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}")] = None
    """Settings by name, by default "small". Other options change them."""

    config: Path | None = None
    """Settings from the config.json of a run, instead of a preset."""


def main() -> None:
    """Runs the command line."""
    be_brief()
    try:
        start(parse(sys.argv[1:]))
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        processes.end(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt as error:
        print(f"stopped{error}", file=sys.stderr)
        processes.end(INTERRUPTED)


def be_brief() -> None:
    """Keeps libraries from printing tracebacks of errors that the script says in one sentence."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax and grain log what they raise.

    def on_thread(args: threading.ExceptHookArgs) -> None:
        # The threads that write for TensorBoard find the disk as full as the main one does.
        if getattr(args.exc_value, "errno", None) not in CANNOT_WRITE:
            threading.__excepthook__(args)

    def on_unraisable(args: Any) -> None:
        # tensorstore tells orbax's event loop of an error, after orbax has closed the loop.
        if str(args.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(args)

    threading.excepthook, sys.unraisablehook = on_thread, on_unraisable


def start(config: TrainConfig) -> None:
    """Compiles only, trains, tests or measures, as the settings say."""
    with user_errors():
        towers = config.net_config(num_classes=2, image_channels=3).towers
    if cpus := config.devices.cpu_devices(towers):
        jax.config.update("jax_num_cpu_devices", cpus)
    if config.devices.compile_only is not None:
        compile_only(config, config.devices.compile_only)
        return
    use_cache(config.work.cache)
    processes.join(config.devices)
    run = set_up(config, lambda text: print(text, file=sys.stderr))
    console = Console(soft_wrap=True, quiet=not processes.is_first())
    way_back = f"go on with --resume --run-dir {run.folder}"
    try:
        work_on(run, console, way_back)
        run.close()
        processes.synchronize("done")
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"; {way_back}") from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        if processes.is_from_a_lost_process(error):
            raise RunError(f"another process of the run was lost ({reason}); {way_back}") from error
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise RunError(
                f"cannot write to {run.folder}: {error.strerror}; the last whole checkpoint is "
                f"{run.checkpoints.newest}"
            ) from error
        raise


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Returns the settings of a preset, a file or a run to resume, changed by the options.

    Raises:
      UsageError: they cannot be found or do not go together.
    """
    asked = any(argument in ("-h", "--help") for argument in arguments)
    start, others = tyro.cli(Start, args=list(arguments), return_unknown_args=True, add_help=False)
    preset = start.preset or "small"
    if preset not in PRESETS:
        nearest = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0)[0]
        raise UsageError(f"unknown --preset {preset}; the nearest is {nearest}")
    if start.preset and start.config:
        raise UsageError("--preset and --config exclude each other: both give the defaults")
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
    """Keeps compiled programs, so that a second start with the same settings compiles nothing."""
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.expanduser() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Under plain jit a program contains a pointer, which differs from start to start.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)


def compile_only(config: TrainConfig, topology: str) -> None:
    """Compiles a training step for a TPU topology and prints what each device does in it.

    Raises:
      UsageError: the settings do not fit the topology, or it cannot be compiled for.
    """
    jax.config.update("jax_platforms", "cpu")
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


def work_on(run: Run, console: Console, way_back: str) -> None:
    """Trains, tests or measures."""
    with processes.stop_requests() as asked_to_stop:
        describe(run, console)
        console.print(f"Run folder: {run.folder}. If the run is stopped, {way_back}")
        if run.config.eval_only:
            show_result(run, console, evaluate(run))
        elif run.config.work.profile_input:
            console.print(profile_input(run), highlight=False)
        elif (loop := Loop(run, console, asked_to_stop)).train():
            show_result(run, console, loop.tested or evaluate(run))
            console.print(f"All of it is in {run.folder}")
        else:
            console.print(f"Asked to stop: all is saved after step {int(run.state.step)}.")


def show_result(run: Run, console: Console, tested: Evaluation) -> None:
    """Prints how good the net is."""
    console.print(
        f"Test accuracy: {tested.top1:.2%}, top-5 {tested.top5:.2%}, loss {tested.loss:.4f}.",
        highlight=False,
    )
    if run.damage.names:
        console.print(f"Damaged images: {len(run.damage.names)}.")


def describe(run: Run, console: Console) -> None:
    """Prints what is about to be trained, and where it lives."""
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
        # The memory is compared with that of a device of this process.
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
            alone=alone if mesh.size > 1 and processes.is_first() else None,
        )
        if config.recipe.accumulate > 1:
            console.print(f"For each of the {config.recipe.accumulate} parts of a batch:")
        console.print(str(report), markup=False, highlight=False)
    if processes.is_first():
        if not config.eval_only:
            save_placement(run.folder / "placement.svg", mesh, run.net)
        if config.work.dump_hlo:
            dump_programs(run.folder, run.trainer, run.batch_size, run.image_shape)
    if run.extension:
        console.print(run.extension, highlight=False)


def settings(config: TrainConfig) -> str:
    """Returns every setting, in a line for each part."""
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
