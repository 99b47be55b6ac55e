"""What the tests of the studies share: small grids, killing a study half way, looking at a page in a browser."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import with_tests

from fewbit.studies.choice import StudyChoice
from fewbit.studies.registry import find_study, make_choice

SMALL = {"windows": 3, "sequence_length": 48, "sources": "random-tokens", "samples": 6, "sample_length": 32}

SLOW = """
import sys, time
import fewbit.studies.{module} as module
from study_cases import study_choice
from fewbit.studies.run import run_study
original = module.{function}
def slow(*arguments):
    time.sleep(0.15)
    return original(*arguments)
module.{function} = slow
run_study(module.STUDY, study_choice(*sys.argv[1:4], **{given!r}))
"""


def study_choice(name: str, model: Any, out: Any, **given: Any) -> StudyChoice:
    """A quick study of a tiny model, on a text beside its output."""
    text = Path(out).parent / "text.txt"
    if not text.exists():
        text.write_text("".join(f"Item {i} is {i * i % 97} and {'abcdefgh'[i % 7 :]}. " for i in range(400)))
    return make_choice(find_study(name), str(model), Path(out), str(text), {"size": "quick", **SMALL, **given})


def kill_half_way(name: str, model: Path, out: Path, function: str, cells: int, **given: Any) -> None:
    """Run a study in a process of its own, slowed down, and kill it after some cells."""
    code = SLOW.format(module=name, function=function, given=given)
    process = subprocess.Popen(
        [sys.executable, "-c", code, name, str(model), str(out)], stderr=subprocess.PIPE, env=with_tests()
    )
    deadline = time.monotonic() + 120
    while len(list((out / "cells").glob("*.json"))) < cells and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


def without_run(path: Path) -> dict[str, Any]:
    """A study's JSON but for what changes from run to run."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    del data["run"]
    return data


def look_at(page: Path, folder: Path) -> str:
    """The page as a headless browser builds it, with a screenshot beside; skips where there is no browser."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome to look at the page with")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    # Whatever the page would fetch fails: the picture is of the file alone.
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1200,3000"]
    image = folder / "page.png"
    result = subprocess.run(
        [browser, *flags, "--dump-dom", f"--screenshot={image}", page.absolute().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(folder)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
