"""Files of the store are complete or absent, and only the calibration text of the interrupted run goes on."""

from pathlib import Path
from typing import Any

import pytest

from fewbit.errors import FewbitError
from fewbit.pipeline.solved_store import SolvedStore

SHA = "0123456789abcdef" * 4


def test_the_hash_of_the_tokens_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, write = SolvedStore(tmp_path), Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise KeyboardInterrupt

    def fail(path: Path, *arguments: Any, **more: Any) -> int:
        raise AssertionError("written in place")

    monkeypatch.setattr(Path, "write_bytes", half)
    monkeypatch.setattr(Path, "write_text", fail)
    for write_file in (lambda: store.same_tokens(SHA), lambda: store.put_notes(0, [{"note": 1}])):
        with pytest.raises(KeyboardInterrupt):
            write_file()
    assert {path.suffix for path in tmp_path.iterdir()} <= {".partial"}
    monkeypatch.undo()
    store.same_tokens(SHA)
    store.same_tokens(SHA)
    store.put_notes(0, [{"note": 1}])
    assert store.notes(0) == [{"note": 1}] and store.notes(1) == []
    with pytest.raises(FewbitError, match="the calibration text has changed since this run was interrupted"):
        store.same_tokens(SHA[::-1])
