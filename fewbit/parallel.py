"""Several threads of this process, each with a core to itself.

Small operations gain little from several cores: two sequences side by side, each on one core, are faster than one after
the other on both (docs/experiments.md).
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def over_cores(work: Callable[[int, int], None], count: int, workers: int) -> None:
    """Call ``work(item, worker)`` for every item from 0 to `count`, dealt out to `workers` threads in turn.

    The same worker always gets the same items, in order. With one worker all happens in the calling thread, with as
    many cores an operation as torch has. An exception of any worker ends the others after their present item and is
    raised.
    """
    if workers <= 1:
        for item in range(count):
            work(item, 0)
        return
    stop = threading.Event()

    def share(worker: int) -> None:
        torch.set_num_threads(1)
        try:
            for item in range(worker, count, workers):
                if stop.is_set():
                    return
                work(item, worker)
        except BaseException:
            stop.set()
            raise

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                shares = [pool.submit(share, worker) for worker in range(workers)]
                for one in shares:
                    one.result()
            finally:
                stop.set()
    finally:
        # A worker's choice is the default of threads to come.
        torch.set_num_threads(before)
