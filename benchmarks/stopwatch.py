"""How fast a program generates, for the scripts that compare runtimes. Needs nothing that is not in Python.

A step generates one token of one sequence, on one thread. Of many steps the median counts, so that one in which another
program had the processor does not.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

STEPS, WARM_UP = 24, 4


def speed_of(step: Callable[[], Any], steps: int = STEPS) -> dict[str, float]:
    """Call `step` so many times; the first WARM_UP do not count.

    Returns tokens_per_second (of the clock), processor_seconds (for a token) and load (the machine's, on average over
    the minute before: this program counts as 1; 0 where the system does not say).
    """
    clock, processor = [], []
    for _ in range(steps):
        began = time.perf_counter(), time.process_time()
        step()
        clock.append(time.perf_counter() - began[0])
        processor.append(time.process_time() - began[1])
    return {
        "tokens_per_second": 1 / statistics.median(clock[WARM_UP:]),
        "processor_seconds": statistics.median(processor[WARM_UP:]),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
    }
