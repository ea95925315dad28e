"""Several processes of one run, and the signal that asks a run to stop.

jax.distributed brings the processes together, and its heartbeat ends all of them when one is lost.
"""

import contextlib
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from alexnet.config import Devices
from alexnet.errors import UsageError

MEETING = 300
"""Seconds that the processes have to find each other."""

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost."""

PATIENCE = 600
"""Seconds that a process waits for slower ones to load, to compile and to write."""

FAREWELL = 10
"""Seconds that a process with an error waits for others, which may come to the same error."""

LOST = ("gloo", "nccl", "coordination", "heartbeat", "barrier", "unavailable", "deadline", "socket")
"""Words in the messages of errors that come from a lost process."""


def join(devices: Devices) -> None:
    """Joins the processes that the settings name or that the cluster has.

    Raises:
      UsageError: there are no others to be found.
    """
    if not devices.several_processes:
        return
    where = f"at {devices.coordinator}" if devices.coordinator else "in the cluster"
    print(f"meeting the others {where}, for {MEETING} seconds at most", file=sys.stderr)
    # The service tells all processes when one gets a SIGTERM, see `stop_requests`.
    jax.config.update("jax_enable_preemption_service", True)
    try:
        jax.distributed.initialize(
            devices.coordinator,
            devices.num_processes,
            devices.process_id,
            initialization_timeout=MEETING,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"cannot meet the other processes {where} ({reason}); --coordinator HOST:PORT, "
            "--num-processes and --process-id name them"
        ) from error


def end(code: int) -> None:
    """Ends this process at once, without what waits at a usual exit for a lost process."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):
        synchronize("end", FAREWELL)
    os._exit(code)


def is_first() -> bool:
    """Returns whether this process prints, draws and writes the files of the run."""
    return jax.process_index() == 0


def is_from_a_lost_process(error: BaseException) -> bool:
    """Returns whether an error comes from the end of another process."""
    return jax.process_count() > 1 and any(word in str(error).lower() for word in LOST)


def synchronize(name: str, patience: int = PATIENCE) -> None:
    """Waits until all processes are here."""
    if (count := jax.process_count()) > 1:
        # With the processes named, this is not a collective, which would wait for 30 seconds only.
        ocp.multihost.sync_global_processes(name, timeout=patience, processes=set(range(count)))


def agreed(number: int) -> int:
    """Returns the number of the first process, which is below 2**32."""
    return int(multihost_utils.broadcast_one_to_all(np.uint32(number)))


def any_of(here: bool) -> bool:
    """Returns whether it is so in any process. All processes must call this function."""
    return bool(np.any(multihost_utils.process_allgather(np.uint32(here))))


def check_same(what: str, text: str) -> None:
    """Raises UsageError unless the text is the same in all processes."""
    synchronize(what)
    try:
        multihost_utils.assert_equal(np.uint32(zlib.crc32(text.encode())))
    except AssertionError as error:
        raise UsageError(f"the processes of a run must have the same {what}") from error


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Gives a function of the step that says whether SIGTERM has asked the run to stop after it.

    Clusters announce by SIGTERM that a machine is taken away. Several processes agree on a step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
