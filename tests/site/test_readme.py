"""The README's code runs as printed, and its error message is the one that users get."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from grouped_conv_jax import grouped_conv

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_code_runs_in_order(tmp_path, monkeypatch):
    assert len(BLOCKS) == 7
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert names["dx"].shape == names["x"].shape
    assert names["dw"].shape == names["w"].shape


def test_the_error_message_is_as_printed():
    with pytest.raises(ValueError, match="feature_group_count=32") as raised:
        grouped_conv(
            jnp.ones((1, 48, 4, 4)), jnp.ones((64, 1, 1, 1)), (1, 1), "SAME", feature_group_count=32
        )
    assert f"ValueError: {raised.value}\n" in README
