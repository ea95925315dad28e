"""The clock: contenders taking turns, and what is kept of their times."""

import time
from collections.abc import Callable, Mapping

PAUSE = 0.01
"""Seconds between two turns, in which the threads of the contender before stop spinning."""

WARM_UP = 0.02
"""Seconds of calls at the beginning of a turn that are not timed: in training one call follows the
other, with threads awake and arrays in the caches.
"""


def interleaved(
    contenders: Mapping[str, Callable[[], object]], *, turns: int, calls: int, budget: float
) -> dict[str, list[float]]:
    """Seconds of each timed call of each contender, which take turns in this process.

    A turn is at least one call that is not timed, more if they are short (see `WARM_UP`), since the
    contender before has left its arrays in the caches, and then `calls` timed ones.

    Args:
      contenders: callables without arguments, which return when all is computed.
      turns: how often each contender's turn comes.
      calls: timed calls in a turn.
      budget: a contender whose timed calls have taken more seconds is not called again.

    Returns:
      At least one time for each contender.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, call in contenders.items():
            if sum(seconds[name]) > budget:
                continue
            time.sleep(PAUSE)
            began = time.perf_counter()
            call()
            while time.perf_counter() - began < WARM_UP:
                call()
            for _ in range(calls):
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
                if sum(seconds[name]) > budget:
                    break
    return seconds
