"""Tunings in files: what is kept, what is not trusted, and several processes that write at once."""

import functools
import json
import re
import subprocess
import sys
from typing import Any

import pytest
from comparison import value_and_gradients
from tunings import CONV, FOR_VMAP, HERE, W, X, Y, automatic, lowered, made_up

from grouped_conv_jax import Tuning
from grouped_conv_jax.algorithms.devices import Device


@pytest.fixture
def tuning() -> Tuning:
    return made_up(value_and_gradients(CONV), X, W, Y, times={**FOR_VMAP, "dense": None})


def changed(path, **changes: Any) -> None:
    """Changes every measurement in a file."""
    content = json.loads(path.read_text())
    for measurement in content["measurements"]:
        measurement.update(changes)
    path.write_text(json.dumps(content))


def loaded_with_one_warning(path, match: str) -> Tuning:
    with pytest.warns(UserWarning, match=match) as caught:
        found = Tuning.load(path)
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)
    assert caught[0].filename == __file__
    return found


def test_what_is_saved_is_loaded(tuning, tmp_path):
    path = tmp_path / "tuning.json"
    tuning.save(path)
    assert Tuning.load(str(path)) == tuning
    with pytest.raises(FileNotFoundError):
        Tuning.load(tmp_path / "no.json")


def test_a_file_keeps_what_it_has(tuning, tmp_path):
    path = tmp_path / "tuning.json"
    tuning.save(path)
    changed(path, jax="0.1", seconds={"something of the future": 1.0})
    newer = made_up(CONV, X[:1], W, times={"xla": 1.0})
    newer.save(path)
    newest = made_up(CONV, X[:1], W, times={"vmap": 2.0})
    newest.save(path)
    assert len(json.loads(path.read_text())["measurements"]) == 4
    assert loaded_with_one_warning(path, r"not used: 3 made with .*jax 0\.1") == newer | newest
    # Now there is nothing that is not in these versions, too.
    tuning.save(path)
    assert Tuning.load(path) == tuning | newer | newest


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "not JSON"),
        ('{"format": "grouped_conv_jax tuning", "ver', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\xff\xfe", "not JSON"),
        ("[]", "not a tuning"),
        ('{"measurements": []}', "not a tuning"),
        ('{"format": "grouped_conv_jax tuning", "version": 1}', "not a tuning"),
        (
            '{"format": "grouped_conv_jax tuning", "version": 1, "measurements": {}}',
            "not a tuning",
        ),
        (
            '{"format": "grouped_conv_jax tuning", "version": 2, "measurements": []}',
            "of version 2 of the format, not 1",
        ),
    ],
)
def test_a_file_that_is_something_else(content, match, tuning, tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text(content, "latin-1")
    assert loaded_with_one_warning(path, match) == Tuning()
    with pytest.raises(ValueError, match=rf"tuning\.json is {match}; save to another file"):
        tuning.save(path)
    assert path.read_text("latin-1") == content


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": {}},
        {"seconds": {"vmap": -1.0}},
        {"seconds": {"vmap": 0.0}},
        {"seconds": {"vmap": float("nan")}},
        {"seconds": {"vmap": float("inf")}},
        {"seconds": {"vmap": 10**400}},
        {"seconds": {"vmap": True}},
        {"seconds": {"vmap": "1"}},
        {"seconds": ["vmap"]},
        {"contraction": "sgrad"},
        {"contraction": ["fprop"]},
        {"spec": None},
        {"device_kind": 3},
        {"comment": ""},
    ],
    ids=str,
)
def test_malformed_measurements_are_not_trusted(changes, tuning, tmp_path):
    path = tmp_path / "tuning.json"
    tuning.save(path)
    changed(path, **changes)
    found = loaded_with_one_warning(path, "not used: 3 malformed")
    assert found == Tuning()


def test_unknown_implementations_are_not_trusted(tuning, tmp_path):
    path = tmp_path / "tuning.json"
    tuning.save(path)
    changed(path, seconds={"os.system": 1e-9, "vmap": 1.0})
    match = r"not used: 3 with unknown implementations \(os.system\)"
    assert loaded_with_one_warning(path, match) == Tuning()
    # And they do not spoil what is measured again.
    tuning.save(path)
    assert Tuning.load(path) == tuning


@pytest.mark.parametrize("package", ["jax", "jaxlib", "grouped_conv_jax"])
def test_other_versions_are_not_trusted(package, tuning, tmp_path):
    path = tmp_path / "tuning.json"
    tuning.save(path)
    changed(path, **{package: "0.0.1"})
    assert loaded_with_one_warning(path, rf"made with .*{package} 0\.0\.1") == Tuning()


def test_other_devices_are_not_trusted(tuning, tmp_path):
    path = tmp_path / "tuning.json"
    made_up(CONV, X, W, times=FOR_VMAP, device=Device("tpu", "TPU v9")).save(path)
    found = loaded_with_one_warning(
        path, rf"measured on TPU v9 \(tpu\), and this is {re.escape(str(HERE))}$"
    )
    with found:
        assert lowered(CONV, X, W) == automatic(CONV, X, W)
    # A file for several devices is nothing to warn of.
    tuning.save(path)
    assert Tuning.load(path) == tuning | found


def test_a_cpu_that_the_file_does_not_name_is_another_device(tuning, tmp_path):
    path = tmp_path / "tuning.json"
    tuning.save(path)
    changed(path, device_kind="cpu")
    match = f"not used: measured on a CPU that is not named, and this is {re.escape(str(HERE))}$"
    with loaded_with_one_warning(path, match):
        assert lowered(CONV, X, W) == automatic(CONV, X, W)
    tuning.save(path)
    with Tuning.load(path):
        assert lowered(CONV, X, W) == {("fprop", "vmap")}


PROGRAM = """
import sys
from grouped_conv_jax import Tuning
from grouped_conv_jax.algorithms.devices import Device
from grouped_conv_jax.algorithms.ranking import Subject
from grouped_conv_jax.tuning.measurement import Measurement

path, platform, kind, who = sys.argv[1:]
print("ready", flush=True)
input()
for i in range(20):
    subject = Subject(Device(platform, kind), "fprop", f"{who} {i}")
    Tuning((Measurement.of(subject, {"xla": 1.0}),)).save(path)
"""


def test_processes_that_save_at_once_lose_nothing(tmp_path):
    path = tmp_path / "tuning.json"
    start = functools.partial(
        subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    writers = [start([sys.executable, "-c", PROGRAM, str(path), *HERE, who]) for who in "ab"]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    for writer in writers:
        writer.communicate()
    specs = {m.subject.spec for m in Tuning.load(path).measurements}
    assert specs == {f"{who} {i}" for who in "ab" for i in range(20)}


def test_a_link_stays_one_and_the_file_keeps_its_mode(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    made_up(CONV, X, W, times=FOR_VMAP).save(target)
    target.chmod(0o664)
    link.symlink_to(target)
    made_up(CONV, X[:1], W, times=FOR_VMAP).save(link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o664
    assert len(Tuning.load(target).measurements) == 2
