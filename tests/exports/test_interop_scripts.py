"""The scripts that compare runtimes: they make every folder that they name, and say what is beyond its bound."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_scripts import BENCHMARKS, load_script
from integer_models import build


@pytest.fixture(scope="module")
def script() -> Iterator[Callable[[str], ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield load_script


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("interop") / "model")


@pytest.mark.parametrize(
    ("kind", "width", "found"),
    [
        ("gptq", "3", (3, "signed, groups of 128")),
        ("awq", "4", (4, "zero-point, groups of 128")),
        ("mlx", "2", (2, "minimum, groups of 64")),
        ("compressed-tensors", "4", (4, "signed, groups of 128")),
        ("compressed-tensors", "fp8", (8, "fp8")),
        ("compressed-tensors", "w8a8", (8, "w8a8")),
    ],
)
def test_folders(
    script: Callable[[str], ModuleType], model: Path, tmp_path: Path, kind: str, width: str, found: tuple[int, str]
) -> None:
    readers = script("integer_readers")
    method, choices = readers.choices_of(kind, width, "rtn", None)
    native, out = readers.make(model, kind, method, choices, tmp_path)
    assert list(out.glob("*.safetensors"))
    assert readers.choice_of(native, width) == found


def test_verdicts(script: Callable[[str], ModuleType]) -> None:
    readers = script("integer_readers")
    row = readers.Row("gptq", 4, "symmetric", "A", "1", "tiny", True, True, 479, 480, 0.2, 30.0)
    figures = {"kl_mean": 5e-4, "perplexity_ours": 20.0, "perplexity_reader": 20.1}
    assert readers.said(row, figures, (1e-3, 0.3))[0]
    assert not readers.said(row, {**figures, "kl_mean": 2e-3}, (1e-3, 0.3))[0]
    assert not readers.said(row, figures, (1e-3, 0.1))[0]
    unequal = readers.Row("gptq", 4, "symmetric", "A", "1", "tiny", True, False, 479, 480, 0.2, 30.0)
    passed, line = readers.said(unequal, figures, (1e-3, 0.3))
    assert not passed and line.startswith("FAILED: weights UNEQUAL")


@pytest.mark.parametrize(("windows", "length"), [(2, 512), (4, 256), (8, 256), (24, 512)])
def test_prompts_are_whole(script: Callable[[str], ModuleType], windows: int, length: int) -> None:
    ids = torch.arange(windows * length).view(windows, length)
    prompts = script("llama_cpp").prompts_of(ids)
    assert {len(prompt) for prompt in prompts} == {24}
    assert len({prompt[0] for prompt in prompts}) == 20


def test_speed_is_the_median_after_the_first_steps(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopwatch = script("stopwatch")
    now = {"clock": 0.0, "processor": 0.0}
    lasting = iter([9.0] * stopwatch.WARM_UP + [1.0, 2.0, 90.0])

    def step() -> None:
        seconds = next(lasting)
        now["clock"] += seconds
        now["processor"] += seconds / 2

    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now["clock"])
    monkeypatch.setattr(stopwatch.time, "process_time", lambda: now["processor"])
    found = stopwatch.speed_of(step, stopwatch.WARM_UP + 3)
    assert (found["tokens_per_second"], found["processor_seconds"]) == (0.5, 1.0)


def test_a_part_fails_with_its_tests(
    script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    interop = script("interop")
    monkeypatch.setattr(interop, "environment", lambda name: Path(sys.executable))
    monkeypatch.setattr(sys, "argv", ["interop.py", "mlx"])
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> object:
        ran.append(command)
        return type("Done", (), {"returncode": int("pytest" in command)})

    monkeypatch.setattr(interop.subprocess, "run", run)
    assert interop.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "mlx: FAILED: tests"
    assert len(ran) == 3
