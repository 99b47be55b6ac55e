"""`fewbit chat` in a real terminal: text streams, Ctrl-C stops an answer and not the conversation, Ctrl-D ends."""

import os
import sys
from pathlib import Path

import pytest
from conftest import build_tiny
from terminals import Terminal

import fewbit

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")]
TEMPLATE = "<s>{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}={% endif %}"


def test_keys_of_a_terminal(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "model", dtype="float32", max_position_embeddings=8192, eos_token_id=None)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    fewbit.quantize(folder, tmp_path / "out", fewbit.preset("rtn", bits=4, group_size="32"))
    words = [sys.executable, "-m", "fewbit.cli", "chat", str(tmp_path / "out"), "--max-new-tokens", "4000"]
    environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": str(Path(fewbit.__file__).parents[1])}
    with Terminal(words, environment) as terminal:
        at = terminal.wait_for("> ", terminal.wait_for("Ctrl-D ends."))
        terminal.type("hello\n")
        terminal.wait_for("hello", at)
        # The answer has not ended when its first words are there: it would be many times longer.
        terminal.wait_for_more(40)
        terminal.type("\x03")
        at = terminal.wait_for("\n> ", len(terminal.seen))
        # At the prompt, it ends nothing either.
        at = terminal.press("\x03", "Ctrl-D ends", at)
        at = terminal.wait_for("> ", at)
        terminal.type("go on\n")
        terminal.wait_for("go on", at)
        terminal.wait_for_more(40)
        terminal.type("\x03")
        terminal.wait_for("\n> ", len(terminal.seen))
        terminal.type("\x04")
        assert terminal.end() == 0
    assert "fewbit: " in terminal.seen.rsplit("> ", 1)[1]
    assert "Traceback" not in terminal.seen
