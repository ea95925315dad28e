"""Devices of TPUs that are not there. If libtpu is installed, XLA compiles for them on any CPU."""

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

NAMES = ("v4:2x2x1", "v5e:2x2", "v5e:4x4", "v5e:16x16", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1")
"""Some topologies. A name is a generation of TPUs, and how its chips are arranged."""

ENVIRONMENT = {
    # Without these libtpu looks for the TPU that it is on.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Several processes may compile at a time, since none uses a TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""libtpu needs these variables where there is no TPU. Those that the user has set are kept."""


def topology_devices(name: str) -> list[Any]:
    """Returns the devices of a TPU topology such as "v5e:4x4".

    Programs can be lowered and compiled for them, and nothing can run on them.

    Raises:
      ValueError: there is no such topology.
      RuntimeError: libtpu is not installed.
    """
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if importlib.util.find_spec("libtpu") is None:
        raise RuntimeError('compiling for a TPU needs libtpu: pip install "jax[tpu]"')
    forms = f"names are GENERATION:CHIPS, like {', '.join(NAMES)}"
    if not name:  # libtpu would take a topology of its own choice.
        raise ValueError(f"there is no TPU topology ''; {forms}")
    try:
        return list(topologies.get_topology_desc(name, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].partition(": ")[2]
        why = "" if "regex" in reason else f" ({reason})"
        raise ValueError(f"there is no TPU topology {name!r}{why}; {forms}") from None
