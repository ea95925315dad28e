"""The settings of a run: as options, as a file and by name; mistakes name what is nearest."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from settings import PARTS, config_of
from train_alexnet import parse, settings

from alexnet.config import Devices, NetName, Recipe, TrainConfig, Work
from alexnet.errors import UsageError
from alexnet.presets import PRESETS
from grouped_conv_jax.models import ALEXNETS

OTHERS: dict[str, Any] = {
    "data": "photos",
    "net": "photos",
    "towers": 4,
    "epochs": 7,
    "steps": 70,
    "weights": Path("some/weights.npz"),
    "seed": 3,
    "batch_size": 48,
    "accumulate": 2,
    "learning_rate": 0.5,
    "warmup_epochs": 2.0,
    "schedule": "steps",
    "patience": 3,
    "most_drops": 2,
    "drop_epochs": (2.0, 4.5),
    "momentum": 0.8,
    "weight_decay": 1e-3,
    "decay_biases": False,
    "bias_rate": 2.0,
    "lars": 0.001,
    "dtype": "bfloat16",
    "ema": 0.9,
    "normalization": "mean",
    "colour": 0.1,
    "ten_crop": True,
    "mesh": (2, 2),
    "placement": "jit",
    "implementation": "lax",
    "workers": 2,
    "max_damaged": 5,
    "log_every": 3,
    "tensorboard": True,
    "checkpoint_every": 11,
    "keep": 4,
    "profile_steps": (2, 5),
    "dump_hlo": True,
    "cache": Path("some/where"),
}
"""A value of every setting of a run that is not the default."""

OF_THIS_START = ("run_dir", "resume", "eval_only", "profile_input", "compile_only")
OF_THIS_PROCESS = ("distributed", "coordinator", "num_processes", "process_id")


def flat(config: TrainConfig) -> dict[str, Any]:
    return {
        field.name: getattr(part, field.name)
        for part in (config, config.recipe, config.devices, config.work)
        for field in dataclasses.fields(part)
        if field.name not in PARTS
    }


def as_options(values: dict[str, Any]) -> list[str]:
    options = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    return options


def saved(tmp_path: Path, **changes: Any) -> Path:
    """The file of a run, with changes at "part.name"."""
    path = tmp_path / "config.json"
    config_of().save(path, classes=["a"])
    file = json.loads(path.read_text())
    for where, value in changes.items():
        *part, name = where.split("__")
        (file["settings"][part[0]] if part else file["settings"])[name] = value
    path.write_text(json.dumps(file))
    return path


def test_every_setting_is_an_option():
    values = flat(parse(as_options(OTHERS)))
    assert {name: values[name] for name in OTHERS} == OTHERS
    assert values.keys() - OTHERS.keys() == {*OF_THIS_START, *OF_THIS_PROCESS}
    usual = flat(TrainConfig())
    assert not [name for name in OTHERS if OTHERS[name] == usual[name] and name != "tensorboard"]


def test_settings_are_saved_and_loaded(tmp_path):
    for config in (config_of(**OTHERS), TrainConfig(), *PRESETS.values()):
        path = tmp_path / "config.json"
        config.save(path, classes=["a"])
        assert TrainConfig.load(path) == (config, {"classes": ["a"]})


def test_what_belongs_to_a_start_is_not_saved(tmp_path):
    path = tmp_path / "config.json"
    process = {"coordinator": "host:1", "num_processes": 2, "process_id": 1, "distributed": True}
    start = {"run_dir": tmp_path, "resume": True, "eval_only": True, "profile_input": True}
    start["compile_only"] = "v5e:2x2"
    config_of(**OTHERS, **process, **start).save(path)
    assert TrainConfig.load(path)[0] == config_of(**OTHERS)


def test_every_setting_is_shown():
    shown = settings(config_of(**OTHERS))
    for name, value in flat(config_of(**OTHERS)).items():
        assert f" {name} {value}" in shown


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_it_is_called_and_its_net_exists(name):
    config = parse(["--preset", name])
    assert config == PRESETS[name]
    net = config.net_config(num_classes=1000, image_channels=3)
    assert net.num_classes == 1000
    changed = parse(["--preset", name, "--batch-size", "512"])
    assert changed == dataclasses.replace(
        config, recipe=dataclasses.replace(config.recipe, batch_size=512)
    )


def test_every_net_can_be_asked_for():
    assert set(typing.get_args(NetName)) == set(ALEXNETS)


def test_a_file_gives_the_settings_of_a_new_run(tmp_path):
    path = tmp_path / "config.json"
    config_of(**OTHERS).save(path, classes=["a"])
    assert parse(["--config", str(path)]) == config_of(**OTHERS)
    assert parse(["--config", str(path), "--seed", "9"]) == config_of(**OTHERS | {"seed": 9})
    # Less than all of them, by hand, and whole numbers where there might be a fraction.
    path.write_text('{"settings": {"epochs": 2, "recipe": {"learning_rate": 1}}}')
    assert parse(["--config", str(path)]) == TrainConfig(epochs=2, recipe=Recipe(learning_rate=1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--colur", "0.1"], "Unrecognized options: --colur, 0.1"),
        (["--batch", "8"], "Unrecognized options: --batch, 8"),
        (["--net", "papre"], "Expected one of ('small', 'photos', 'paper'"),
        (["--epochs", "many"], "Error parsing --epochs: invalid literal for int()"),
        (["--mesh", "2"], "Error parsing --mesh"),
        (["--preset"], "Missing value for argument '--preset'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)
def test_a_wrong_option_is_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2
    words = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in words
    nearest = {"--colur": "--colour FLOAT", "--batch": "--batch-size INT"}.get(arguments[0])
    if nearest:
        assert "Perhaps you meant" in words
        assert nearest in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "papr"], "unknown --preset papr; the nearest is paper"),
        (["--preset", "huge"], "unknown --preset huge; the nearest is "),
        (["--config", "none.json"], "no settings in none.json: No such file or directory"),
        (["--preset", "paper", "--config", "x"], "--preset and --config exclude each other"),
    ],
    ids=str,
)
def test_a_wrong_start_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        parse(arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, r': unknown setting "epoch"; the nearest is "epochs"'),
        ({"recipee": {}}, r': unknown setting "recipee"; the nearest is "recipe"'),
        ({"work__log_evry": 1}, r': unknown setting "log_evry"; the nearest is "log_every"'),
        ({"net": "papre"}, r': unknown net "papre"; the nearest is "paper"'),
        ({"epochs": "many"}, r'"epochs" - should be "int" instead of value "many"'),
        ({"recipe": 5}, r'"recipe" - should be "Recipe" instead of value "5"'),
        ({"devices__mesh": [1]}, r'"devices.mesh" - should be "tuple\[int, int\] \| None"'),
        ({"work__cache": 3}, r'"work.cache" - should be '),
    ],
    ids=str,
)
def test_a_wrong_setting_in_a_file_is_named(tmp_path, changes, message):
    with pytest.raises(UsageError, match=rf"config\.json.*{message}"):
        TrainConfig.load(saved(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 5}'])
def test_a_file_that_is_something_else_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json is not what a run has written"):
        TrainConfig.load(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["batch_size", "learning_rate", "ten_crop", "seed", "data"])
def test_a_run_does_not_go_on_with_another_recipe(tmp_path, name):
    config_of().save(tmp_path / "config.json")
    others = as_options({name: OTHERS[name]})
    before = flat(config_of())[name]
    with pytest.raises(UsageError) as error:
        parse(["--resume", "--run-dir", str(tmp_path), *others])
    assert str(error.value) == (
        f"the run to resume was started with --{name.replace('_', '-')} {before}, "
        f"not {OTHERS[name]}"
    )


def test_a_run_goes_on_on_other_devices_and_with_other_work(tmp_path):
    config_of(epochs=3).save(tmp_path / "config.json")
    names = [field.name for part in (Devices, Work) for field in dataclasses.fields(part)]
    others = {name: OTHERS[name] for name in names if name in OTHERS}
    again = {"run_dir": tmp_path, "resume": True}
    options = ["--resume", "--run-dir", str(tmp_path)]
    assert parse([*options, *as_options(others)]) == config_of(epochs=3, **others, **again)
    assert parse(options) == config_of(epochs=3, **again)
    evaluated = parse([*options, "--eval-only"])
    assert evaluated == config_of(epochs=3, eval_only=True, **again)


def test_a_run_goes_on_for_another_number_of_steps(tmp_path):
    config_of(epochs=3).save(tmp_path / "config.json")
    options = ["--resume", "--run-dir", str(tmp_path)]
    again = {"run_dir": tmp_path, "resume": True}
    assert parse([*options, "--epochs", "5"]) == config_of(epochs=5, **again)
    assert parse([*options, "--steps", "5"]) == config_of(epochs=3, steps=5, **again)
    config_of(epochs=3, steps=5).save(tmp_path / "config.json")
    assert parse([*options, "--steps", "7"]) == config_of(epochs=3, steps=7, **again)
    with pytest.raises(UsageError, match="--epochs 4 has no effect on a run of --steps 5; change"):
        parse([*options, "--epochs", "4"])


def test_a_run_goes_on_with_its_own_settings_only(tmp_path):
    config_of().save(tmp_path / "config.json")
    with pytest.raises(UsageError, match="--resume goes on with the settings of its run"):
        parse(["--resume", "--run-dir", str(tmp_path), "--preset", "paper"])


PROCESSES = {"coordinator": "host:1234", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"batch_size": -4}, "--batch-size must be at least 1, got -4"),
        ({"learning_rate": -1.0}, "--learning-rate must be at least 0, got -1.0"),
        ({"weight_decay": float("nan")}, "--weight-decay must be at least 0, got nan"),
        ({"ema": 1.0}, "--ema must be less than 1, got 1.0"),
        ({"batch_size": 9, "accumulate": 2}, "a batch of 9 images cannot be computed in 2 equal"),
        ({"schedule": "steps"}, "--schedule steps needs --drop-epochs"),
        ({"profile_steps": (3, 2)}, r"--profile-steps must be FIRST <= LAST, from 1 on, got \(3"),
        ({"eval_only": True}, "--eval-only needs --resume or --weights"),
        ({"compile_only": "v5e:2x2", "distributed": True}, "--compile-only runs in one process"),
        ({"coordinator": "host:1234"}, "--coordinator, --num-processes and --process-id go"),
        ({"seed": 2**32}, r"--seed must be less than 2\*\*32, got 4294967296"),
        ({"mesh": (0, 2)}, r"--mesh must be two numbers of at least 1, got \(0, 2\)"),
    ],
    ids=str,
)
def test_numbers_that_mean_nothing_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        config_of(**values).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (PROCESSES, "--placement pmap is for devices of one process; take shard_map or jit"),
        ({"compile_only": "v5e:2x2"}, "--placement pmap is for devices of one process"),
        ({"accumulate": 2}, "--placement pmap does not support --accumulate 2; take shard_map or"),
        ({"dtype": "float16"}, "--placement pmap does not support --dtype float16; take"),
    ],
    ids=str,
)
def test_what_pmap_cannot_do_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        config_of(placement="pmap", **values).check()
    config_of(placement="shard_map", **values).check()
    config_of(placement="pmap", dtype="bfloat16", ema=0.9, schedule="plateau").check()
