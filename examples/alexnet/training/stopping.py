"""SIGTERM, by which clusters announce that a machine is taken away: the run saves and ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether the run has been asked to end."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self, *_: object) -> None:
        """The handler of the signal."""
        self._asked.set()

    def after(self, step: int) -> bool:
        """Whether to end after a step, which is the same one in all processes."""
        if jax.process_count() > 1:
            # The runtime has the signal; it lets the processes agree on a step.
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked.is_set()


@contextmanager
def on_sigterm() -> Iterator[Stop]:
    """While this lasts, a SIGTERM does not kill the process but asks it to stop."""
    stop = Stop()
    if jax.process_count() > 1:
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
