"""docs/migration.md: what one writes elsewhere and what one writes here give the same numbers."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import random

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
SECTIONS = dict(re.findall(r"^## From (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.M))

PEERS = {
    "lax": "jax",
    "Flax nnx": "flax",
    "Flax linen": "flax",
    "Haiku": "haiku",
    "Equinox": "equinox",
    "Keras": "keras",
    "PyTorch": "torch",
}
"""The module that each section needs."""

OTHER_LIBRARIES = ("Haiku", "Equinox", "Keras", "PyTorch")
"""Their imports take seconds."""

PAIRS = {
    "lax": 6,
    "Flax nnx": 5,
    "Flax linen": 2,
    "Haiku": 3,
    "Equinox": 3,
    "Keras": 7,
    "PyTorch": 10,
}


def blocks(section: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)


def pairs(section: str) -> list[str]:
    return [block for block in blocks(section) if re.search(r"^ours = ", block, re.M)]


def test_each_peer_has_its_section():
    assert list(SECTIONS) == list(PEERS)
    assert {section: len(pairs(section)) for section in SECTIONS} == PAIRS


# Keras asks its variables for arrays as NumPy 1 did.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize(
    "section",
    [
        pytest.param(section, marks=[pytest.mark.slow] * (section in OTHER_LIBRARIES))
        for section in PEERS
    ],
)
def test_theirs_and_ours_are_equal(section, monkeypatch, tmp_path):
    # Read when Keras is imported first: the backend that needs nothing else, and where it keeps
    # its settings.
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    pytest.importorskip(PEERS[section], reason=f"{section} is not installed")
    names: dict[str, Any] = {"x": random("x", (2, 8, 8, 8), np.float32)}
    compared = 0
    # The peers rely on JAX's promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks(section):
            names.pop("ours", None)
            exec(compile(block, f"docs/migration.md, {section}", "exec"), names)
            if "ours" in names:
                ours, theirs = np.asarray(names["ours"]), np.asarray(names["theirs"])
                assert ours.shape == theirs.shape, block
                assert ours.std() > 0
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=block)
                compared += 1
    assert compared == PAIRS[section]
