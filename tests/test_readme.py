"""Commands and Python in the documents are the program's own."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from fewbit.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def commands(beginning: str = "fewbit ") -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        for block in re.findall(r"```(?:sh|console)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.removeprefix("$ ").startswith(beginning):
                    found.append((path.name, line.removeprefix("$ ").split("#")[0].strip()))
    return found


def test_there_are_commands() -> None:
    assert len(commands()) > 8


@pytest.mark.slow
@pytest.mark.parametrize(("document", "line"), commands())
def test_every_command_parses(document: str, line: str) -> None:
    command: click.Command = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    context = None
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context("fewbit", words)
    assert context.params is not None


class _ParsedError(Exception):
    """A benchmark has read its arguments: enough."""


@pytest.mark.parametrize(("document", "line"), commands("python benchmarks/"))
def test_every_benchmark_command_parses(document: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(parser, *arguments)
        raise _ParsedError

    script, *words = shlex.split(line)[1:]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    if (ROOT / script).read_text(encoding="utf-8").count("ArgumentParser("):
        with pytest.raises(_ParsedError):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        assert not words


def test_make_targets_and_variables_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in DOCUMENTS:
        # A changelog names what is gone, too.
        text = path.read_text(encoding="utf-8") if path.name != "CHANGELOG.md" else ""
        for target, variable in re.findall(r"(?:^|`)make (\w+)(?: (\w+)=)?", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (path.name, target)
            assert not variable or f"$({variable})" in makefile, (path.name, variable)


def test_the_readme_shows_what_the_demo_prints() -> None:
    from fewbit import demo

    table = re.search(r"```text\n(model .*?)\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert table is not None
    names = [line.split()[0] for line in table[1].splitlines()]
    made = [f"{demo.MODEL}-{method}-{bits}bit" for method, bits in demo.RUNS]
    assert names == ["model", demo.MODEL, *made]


def test_python_in_the_documents_compiles() -> None:
    for path in DOCUMENTS:
        for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            compile(block, path.name, "exec")


def test_linked_files_exist() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_names_in_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:fewbit|tests|docs)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path
    for table, path in re.findall(r"`([A-Z_]+)`(?: in|,) `(fewbit/[\w/]+\.py)`", text):
        assert re.search(rf"^{table}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (table, path)
