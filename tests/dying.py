"""Runs that end early: killed before any one of their steps on the file system, or stopped before they publish."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewbit.checkpoints.workdir import WorkFolder

_STEPS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "os.truncate"}
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="libraries need not survive a fork elsewhere")


def dies_before(step: int, work: Callable[[], Any], inside: str) -> bool:
    """Run `work` in a copy of this process that ends without a word before its `step`-th step below the path `inside`.

    Returns whether it died; False when `work` came to its end first.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, 9), status
        return os.WEXITSTATUS(status) == 9
    left = [step]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _STEPS and any(inside in str(one) for one in arguments):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)

    code = 1
    # A copy that hangs ends by this signal, which the other process takes for a failure.
    signal.alarm(120)
    try:
        sys.addaudithook(watch)
        work()
        code = 0
    finally:
        os._exit(code)


def siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_at(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The next run ends with `error` when everything is written and nothing published."""

    def publish(work: Any) -> None:
        raise error

    patch.setattr(WorkFolder, "publish", publish)
