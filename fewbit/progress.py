"""Progress on standard error: a bar with the remaining time on a terminal, a few plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fewbit.printable import printable

Progress = Callable[[int, int, str], None]
"""What is called as work goes on: how much is done, of how much, and what is going on."""

_PLAIN_EVERY = 10.0
_QUIET_FOR = 2.0


@dataclass
class Counter:
    """Counts steps for a progress line; without one it only counts."""

    progress: Progress | None = None
    total: int = 1
    done: int = 0
    what: str = ""

    def step(self, *_: Any) -> None:
        """One step is done."""
        self.skip(1)

    def skip(self, steps: int) -> None:
        """Add a number of steps that are done, now or in an earlier run."""
        self.done += steps
        self.show()

    def show(self, what: str | None = None) -> None:
        """Update the line."""
        self.what = self.what if what is None else what
        if self.progress:
            self.progress(min(self.done, self.total), self.total, self.what)


@contextmanager
def progress_line(what: str, unit: float = 1.0) -> Iterator[Progress]:
    """A callable (done, total, current) that shows the progress of `what`; `unit` divides the counts for display.

    If the counts fall, a new part of the work begins, and the remaining time is that of this part.
    """
    before, what = 0, printable(what)
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[current]}", style="dim", markup=False),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None, current="")

            def show(done: int, total: int, current: str) -> None:
                nonlocal before
                if done < before:
                    bar.reset(task)
                before = done
                bar.update(task, completed=done / unit, total=total / unit, current=printable(current)[-60:])

            yield show
        return
    began = last = time.monotonic()
    first: int | None = None

    def plain(done: int, total: int, current: str) -> None:
        nonlocal began, last, before, first
        now = time.monotonic()
        if done < before:
            began = last = now
            first = done
        elif first is None:
            # A run that goes on begins far from 0: what was done before took no time here.
            first = done - 1 if done else 0
        before = done
        if now - began < _QUIET_FOR or (now - last < _PLAIN_EVERY and done < total) or not done:
            return
        last = now
        left = (now - began) * (total - done) / max(1, done - first)
        print(f"{what}: {100 * done // total}%  {left:.0f} s left  {printable(current)}", file=sys.stderr, flush=True)

    yield plain
