"""The fuzzer of arguments: a short run of it, and that it sees what it is to find."""

import subprocess
import sys
from pathlib import Path

import fuzz_arguments
import fuzz_calls
import pytest
from fuzz_arguments import Outcome, outcome
from fuzz_calls import Call, random_call

ABORTING = """
import os, sys

sys.path.insert(0, {folder!r})
import fuzz_arguments, fuzz_calls

fuzz_calls.NAMES["os"] = os
names = ["dict", "os.abort", "dict", "dict"]
fuzz_calls.random_call = lambda seed, largest: fuzz_calls.Call("", names[seed], {{}})
fuzz_arguments.main()
"""


def test_hostile_arguments_give_a_result_or_a_clear_error():
    command = [sys.executable, fuzz_arguments.__file__, "--calls", "100"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "100 calls, 0 places with findings" in run.stdout


def test_the_text_of_a_call_can_be_run_again():
    call = random_call(0)
    assert str(call) == str(random_call(0)) != str(random_call(1))
    shuffle = Call("abstract", "channel_shuffle", {"x": "ones((2, 6))", "feature_group_count": "3"})
    assert eval(str(shuffle), fuzz_calls.NAMES).shape == shuffle.prepared()().shape == (2, 6)


@pytest.mark.parametrize(
    ("function", "kind", "is_wrong"),
    [
        ("lambda x: x", "result", False),
        ("lambda x: {}[x]", "KeyError", True),
        ("lambda x: channel_shuffle(x, 1)", "TypeError", False),
        ("lambda x: np.zeros(2, int)[x]", "IndexError", True),
    ],
)
def test_what_is_raised_is_told_apart(function, kind, is_wrong):
    found = outcome(Outcome(0, function), Call("", function, {"x": "'a'"}))
    assert (found.kind, found.is_wrong) == (kind, is_wrong)


def test_a_process_that_ends_is_a_finding_and_the_rest_is_called(monkeypatch, tmp_path, capsys):
    # As it is, but for the calls that it makes: the second one ends it.
    worker = tmp_path / "worker.py"
    worker.write_text(ABORTING.format(folder=str(Path(fuzz_arguments.__file__).parent)))
    monkeypatch.setattr(fuzz_arguments, "__file__", str(worker))
    monkeypatch.setattr(sys, "argv", ["fuzz_arguments.py", "--calls", "4"])
    with pytest.raises(SystemExit) as ended:
        fuzz_arguments.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "1 x signal 6" in printed
    assert "seed 1: os.abort()" in printed
    assert "3 result" in printed
