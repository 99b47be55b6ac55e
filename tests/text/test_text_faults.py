"""Readers of text refuse what libraries refuse; any other exception passes."""

from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer

from fewbit.errors import FewbitError
from fewbit.text.chat import Chat, render
from fewbit.text.rows import parquet_rows

UNKNOWN = [kind("odd") for kind in (OSError, ValueError, KeyError, TypeError, MemoryError)]


@pytest.mark.parametrize("error", UNKNOWN)
def test_parquet(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(FewbitError, match=r"a\.parquet: not a readable Parquet file"):
        list(parquet_rows(tmp_path / "a.parquet"))

    def fail(*arguments: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(parquet, "ParquetFile", fail)
    with pytest.raises(type(error), match="odd"):
        list(parquet_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize("error", UNKNOWN)
def test_chat_templates(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    chat = Chat("a.jsonl:1", ({"role": "user", "content": "hi"},))
    tokenizer.chat_template = "{{ nothing.at.all }}"
    with pytest.raises(FewbitError, match="does not take this conversation"):
        render(chat, tokenizer, None)

    def fail(*arguments: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", fail)
    with pytest.raises(type(error), match="odd"):
        render(chat, tokenizer, None)
