"""What a first command makes, and what is said where its result will not talk sense."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import run_cli

import fewbit
import fewbit.api
from fewbit.advice import advice
from fewbit.cli import app


def commands(lines: list[str]) -> list[list[str]]:
    return [shlex.split(line.split(":  ")[1].split("  (")[0]) for line in lines if ":  fewbit " in line]


def test_the_first_command_makes_four_bits_and_says_nothing(tiny: Path, tmp_path: Path) -> None:
    result = run_cli("quantize", tiny, tmp_path / "out", "--json")
    recipe = json.loads(result.stdout)["report"]["recipe"]
    assert (recipe["method"], recipe["bits"]) == ("adpq+", 4)
    assert "expect" not in result.stderr


@pytest.mark.parametrize(
    ("method", "bits", "expected", "better"),
    [
        ("adpq+", 3, "3 bits without data: expect clearly worse text than at 4 bits", "of this size"),
        ("rtn", 2, "2 bits without data: expect a model that writes no sensible text", "of this size"),
        ("adpq+", 1, "1 bit without data: expect a model that writes no sensible text", "of 2 bits"),
    ],
)
def test_few_bits_without_data(method: str, bits: int, expected: str, better: str) -> None:
    lines = advice("my model", fewbit.preset(method, bits=bits))
    assert lines[0].startswith(expected) and lines[1].startswith(f"a better model {better}:")
    first, second = commands(lines)
    assert first[:4] == second == ["fewbit", "quantize", "my model", "OUT"]
    assert first[first.index("--bits") + 1] == str(max(bits, 2))


@pytest.mark.parametrize(("method", "bits"), [("adpq+", 4), ("rtn", 8), ("precal+oac", 2), ("gptq", 3)])
def test_nothing_is_said_of_the_rest(method: str, bits: int) -> None:
    assert advice("m", fewbit.preset(method, bits=bits)) == []


@pytest.mark.parametrize("target", [None, "llama.cpp"])
def test_the_commands_are_the_programs_own(target: str | None, tiny: Path) -> None:
    group: Any = typer.main.get_command(app)
    found = commands(advice("m", fewbit.preset("adpq+", bits=3), target))
    assert len(found) == 2
    for _, name, *words in found:
        assert ("--for" in words) == (target is not None)
        given = group.commands[name].make_context(name, words).params
        fewbit.api.quantize_request(tiny, given["method"], {k: given[k] for k in ("bits", "calibration", "tune")})


def test_where_it_is_said(tiny: Path, tmp_path: Path) -> None:
    few = ("--method", "rtn", "--bits", 2)
    said = run_cli("quantize", tiny, tmp_path / "out", *few).stderr
    assert "fewbit: 2 bits without data: expect" in said and "--calibration self --tune" in said
    assert "without data: expect" in run_cli("plan", tiny, *few).stdout
    assert "expect" not in run_cli("quantize", tiny, "--report-only", *few).stderr
