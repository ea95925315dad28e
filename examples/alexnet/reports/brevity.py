"""Keeps from stderr what libraries print of errors that the scripts tell in a sentence as well."""

import logging
import sys
import threading
from typing import Any

from alexnet.model_io.checkpoints import CANNOT_WRITE


def be_brief() -> None:
    """From now on, and for the whole process."""
    # Orbax and grain log what they raise, with a traceback.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    unraisable, in_threads = sys.unraisablehook, threading.excepthook

    def on_unraisable(told: Any) -> None:
        # Tensorstore tells an event loop of an error, after which orbax has closed it.
        if str(told.exc_value) != "Event loop is closed":
            unraisable(told)

    def on_thread(told: threading.ExceptHookArgs) -> None:
        # The threads that write for TensorBoard find the disk as full as the main one does.
        if getattr(told.exc_value, "errno", None) not in CANNOT_WRITE:
            in_threads(told)

    sys.unraisablehook, threading.excepthook = on_unraisable, on_thread
