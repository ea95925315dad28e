"""A run of several processes: how they find each other, act as one, and end when one has died."""

import os
import socket
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from alexnet.config import Devices, TrainConfig
from alexnet.errors import RunError, UsageError

Result = TypeVar("Result")

SILENCE = 30
"""Seconds without a sign of life after which a process counts as dead."""

TOGETHER = 300
"""Seconds that the processes have to find each other."""

PATIENCE = 600
"""Seconds that a process waits for the slower ones to load, to compile and to write."""

FAREWELL = 10
"""Seconds in which all processes come to an error that is one of all."""

# The runtime ends a process that cannot go on by abort(), which no Python code sees. This one waits
# for the end of its input, that is of the process at the other end, and says the last line of it.
WATCHER = """
import sys
last = ""
for last in sys.stdin:
    pass
sys.stderr.write("\\n" + last if last.strip() else "")
"""

# What the messages of errors that come from a lost process have in common, in lower case.
LOST = ("gloo", "nccl", "coordination", "heartbeat", "barrier", "unavailable", "deadline", "socket")


class Process:
    """This process among those of a run.

    Args:
      alone: what to say if the runtime ends the process before it has found the others.

    Attributes:
      way_back: options that go on with the run, once there is something to go on from.
    """

    def __init__(self, alone: str):
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", WATCHER],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is not meant for it.
        )
        self._way_back = ""
        self._expect_the_worst(alone)

    @property
    def way_back(self) -> str:
        return self._way_back

    @way_back.setter
    def way_back(self, options: str) -> None:
        self._way_back = f"; go on with {options}"
        self._expect_the_worst(self.lost_message)

    def joined(self) -> None:
        """From now on an end is that of another process, or of this one."""
        self._expect_the_worst(self.lost_message)

    @property
    def lost_message(self) -> str:
        """The one sentence that says what has happened."""
        return (
            f"error: process {jax.process_index()} of {jax.process_count()} has ended: it was "
            f"killed, or another one was{self._way_back}"
        )

    def end_by(self, error: BaseException) -> None:
        """Ends the process at once, without waiting for others, and says why."""
        code = 1
        if isinstance(error, KeyboardInterrupt):
            code = 130
            print(f"stopped{self._way_back}", file=sys.stderr)
        elif isinstance(error, (UsageError, RunError)):
            code = 2 if isinstance(error, UsageError) else 1
            print(f"error: {error}", file=sys.stderr)
        elif of_a_lost_process(error):
            reason = str(error).partition("\n")[0]
            print(f"{reason}\n{self.lost_message}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stderr.flush()
        sys.stdout.flush()
        self.close()
        # What runs at a usual exit waits for processes that will not come.
        os._exit(code)

    def close(self) -> None:
        """The process ends as it should."""
        self._expect_the_worst("")
        assert self._watcher.stdin is not None
        self._watcher.stdin.close()
        self._watcher.wait()

    def _expect_the_worst(self, message: str) -> None:
        assert self._watcher.stdin is not None
        self._watcher.stdin.write(message + "\n")
        self._watcher.stdin.flush()


@contextmanager
def joined(config: TrainConfig) -> Iterator[Process | None]:
    """Among the processes that the settings name or the cluster has; None where there is one.

    Raises:
      UsageError: there are no others to be found.
    """
    devices = config.devices
    if not devices.several_processes:
        yield None
        return
    where = f"at {devices.coordinator}" if devices.coordinator else "in the cluster"
    if devices.coordinator:
        print(f"meeting the others {where}, for {TOGETHER} seconds at most", file=sys.stderr)
    process = Process(f"error: this process has ended before it met the others {where}")
    try:
        _initialize(devices)
        process.joined()
        yield process
        synchronize("done")
    except (UsageError, RunError) as error:
        if _alone_with(error):
            process.end_by(error)
        process.close()
        raise
    except BaseException as error:
        process.end_by(error)
    process.close()


def _alone_with(error: Exception) -> bool:
    """Whether the other processes have not come to an error that this one has."""
    try:
        synchronize("ended", FAREWELL)
    except RuntimeError:
        return True
    return False


def _initialize(config: Devices) -> None:
    # It tells all processes when one gets a SIGTERM, see `stopping`.
    jax.config.update("jax_enable_preemption_service", True)
    if config.process_id == 0 and config.coordinator:
        _check_free(config.coordinator)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=TOGETHER,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=SILENCE,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        if config.coordinator is None:
            raise UsageError(
                f"--distributed finds no cluster ({reason}); name the processes with "
                "--coordinator, --num-processes and --process-id"
            ) from error
        raise UsageError(f"cannot join the run at {config.coordinator}: {reason}") from error


def _check_free(address: str) -> None:
    """Raises UsageError where another program has the port, of which the runtime would die."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(address.rpartition(":")[2])))
        except OSError as error:
            raise UsageError(f"cannot use the port of --coordinator {address}: {error}") from error


def is_first() -> bool:
    """Whether this is the process that talks, draws and writes what is written once."""
    return jax.process_index() == 0


def of_a_lost_process(error: BaseException) -> bool:
    """Whether an error comes from the end of another process."""
    return jax.process_count() > 1 and any(word in str(error).lower() for word in LOST)


def synchronize(name: str, patience: int = PATIENCE) -> None:
    """Waits until all processes are here, for so many seconds at most."""
    if (count := jax.process_count()) > 1:
        # With the processes named it is not a collective, which would wait for 30 seconds only.
        ocp.multihost.sync_global_processes(name, timeout=patience, processes=set(range(count)))


def agreed(number: int) -> int:
    """The number of the first process, below 2**32."""
    return int(multihost_utils.broadcast_one_to_all(np.uint32(number)))


def any_of(here: bool) -> bool:
    """Whether it is so in any process; all must ask."""
    if jax.process_count() == 1:
        return here
    return bool(np.any(multihost_utils.process_allgather(np.uint32(here))))


def by_all(name: str, action: Callable[[], Result]) -> Result:
    """What each process does for itself, and all of them or none.

    Raises:
      UsageError: it went wrong, in any process.
    """
    refused, result = None, None
    try:
        result = action()
    except UsageError as error:
        refused = error
    synchronize(name)
    if any_of(refused is not None):
        raise refused or UsageError("another process cannot go on; see its message")
    return cast(Result, result)


def check_same(what: str, text: str) -> None:
    """Raises UsageError, in every process, unless it is the same text in all."""
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
        if len(set(np.ravel(sums).tolist())) > 1:
            raise UsageError(f"the processes of a run must have the same {what}")


def by_the_first(action: Callable[[], None]) -> None:
    """Lets the first process do something that the others wait for.

    Raises:
      UsageError: it went wrong, in every process.
    """
    refused = None
    if is_first():
        try:
            action()
        except UsageError as error:
            refused = error
    if agreed(refused is not None):
        raise refused or UsageError("the first process cannot go on; see its message")
