"""Names and texts from files reach a terminal only with control characters escaped."""

import ast
import json
from pathlib import Path

import pytest
from conftest import build_tiny, copy_folder, run_cli

import fewbit
from fewbit.cli_shared import print_json
from fewbit.printable import first_line, is_invisible, one_line

EVIL = "\x1b]0;title\x07\u202e"
MADE_PRINTABLE = {
    "printable", "printable_text", "export_summary", "import_summary", "quantize_summary", "tuning_summary",
    "plan_text", "fault_report", "axes_text", "_escaped",
}  # fmt: skip


def test_everything_that_is_printed_is_made_printable() -> None:
    """No call of `print` shows a value that may come from a file without a function that escapes it."""
    found = 0
    for path in sorted(Path(fewbit.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id != "print":
                continue
            for value in node.args:
                found += 1
                names = {one.id for one in ast.walk(value) if isinstance(one, ast.Name)}
                plain = names <= {"__version__", "PROMPT", "quote"} or path.name == "progress.py"
                assert plain or names & MADE_PRINTABLE, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
    assert found > 10


def test_the_name_of_an_adapters_model_is_escaped(tmp_path: Path) -> None:
    model = build_tiny(tmp_path / f"m{EVIL}")
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"base{EVIL}"}))
    said = run_cli("quantize", model, tmp_path / "out", "--method", "rtn", code=None).stderr
    assert "adapter_config.json" in said and r"m\x1b]0;title\x07\u202e" in said
    assert not [letter for letter in said.replace("\n", "") if is_invisible(letter)]
    (model / "config.json").unlink()
    said = run_cli("inspect", model, code=2).stderr
    assert r"base\x1b]0;title\x07\u202e" in said and "\x1b" not in said


def test_a_cache_with_a_name_for_terminals(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / f"cache{EVIL}"
    monkeypatch.setenv("FEWBIT_CACHE", str(cache))
    copy_folder(tiny, cache / "models" / "smollm2-135m")
    for words in (("models", "fetch", "smollm2-135m"), ("models",)):
        said = run_cli(*words).stdout
        assert "\x1b" not in said and "\u202e" not in said
    assert r"cache\x1b]0;title\x07\u202e" in run_cli("models", "fetch", "smollm2-135m").stdout


@pytest.mark.parametrize("letter", [*"\x1b\x7f\x9b\xad\u061c\u200b\u2028\u2060\u2069\ufeff\ue000", "\U000e0041"])
def test_json_keeps_values_and_shows_no_invisible_character(letter: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_json({f"é{letter}": [f"语{letter}"]})
    said = capsys.readouterr().out
    assert json.loads(said) == {f"é{letter}": [f"语{letter}"]}
    assert letter not in said and "é" in said and "语" in said


def test_lines_of_messages() -> None:
    assert one_line(" a \n\n\tb\x1b[2J ") == r"a b\x1b[2J"
    assert one_line("x" * 10, 4) == "xxx…"
    assert first_line(ValueError("\n\n  first \x07\nsecond")) == r"first \x07"
    assert first_line(KeyError()) == "KeyError"
