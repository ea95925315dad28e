"""TPUs that are not there: XLA compiles for their topologies on any CPU, if libtpu is installed."""

import os
from typing import Any

import jax
from jax.experimental import topologies

EXAMPLES = ("v4:2x2x1", "v5e:2x2", "v5e:4x4", "v5e:16x16", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1")
"""Names of topologies: a generation of TPUs, and how its chips are arranged."""

ENVIRONMENT = {
    # libtpu asks the cloud which TPU it is on, and waits for an answer, unless it is told.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Several processes may compile at a time, as none uses a TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu needs to know where there is no TPU; what is set already stays."""


def topology_devices(name: str) -> list[Any]:
    """Returns the devices of a TPU topology such as "v5e:4x4".

    Programs can be lowered and compiled for them, and nothing can run on them.

    Raises:
      ValueError: there is no such topology.
      RuntimeError: libtpu is not installed.
    """
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RuntimeError('compiling for a TPU needs libtpu: pip install "jax[tpu]"') from None
    if not name:  # Which libtpu takes for one of its own choice.
        raise ValueError(
            f"a TPU topology has a name GENERATION:CHIPS, like {', '.join(EXAMPLES)}, got {name!r}"
        )
    try:
        return list(topologies.get_topology_desc(name, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].partition(": ")[2]
        why = "" if "regex" in reason else f" ({reason})"
        raise ValueError(
            f"there is no TPU topology {name!r}{why}; names are GENERATION:CHIPS, like "
            f"{', '.join(EXAMPLES)}"
        ) from None
