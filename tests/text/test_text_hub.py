"""Data sets of the hub: only what says that one cannot be fetched is said to be that."""

import errno
import socket
from pathlib import Path
from typing import Any

import pytest

from fewbit.errors import FewbitError
from fewbit.hub_errors import is_unreachable
from fewbit.text.hub import hub_documents

datasets = pytest.importorskip("datasets")


def documents(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[Any]:
    def load_dataset(*arguments: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return list(hub_documents("some/set", None, False, "FILE"))


@pytest.mark.parametrize(
    "error",
    [ConnectionError("reset"), ConnectionResetError("by peer"), TimeoutError("odd"), socket.gaierror("no name")],
)
def test_the_network(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(FewbitError, match=rf"^some/set: no such file, .*{type(error).__name__}: .*: .*use FILE$"):
        documents(monkeypatch, error)


@pytest.mark.parametrize(
    "error",
    [
        *(
            kind("odd")
            for kind in (OSError, ValueError, RuntimeError, KeyError, TypeError, MemoryError, RecursionError)
        ),
        PermissionError(errno.EACCES, "odd", "/cache/file"),
        OSError(errno.ENOSPC, "odd"),
        RuntimeError("odd: out of memory"),
    ],
)
def test_unknown_exceptions_pass(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    with pytest.raises(type(error), match="odd"):
        documents(monkeypatch, error)


def test_what_datasets_itself_raises(tmp_path: Path) -> None:
    with pytest.raises(FewbitError, match=r"^some/set: no such file, and the data set cannot be fetched \(.*use FILE$"):
        list(hub_documents("some/set", None, False, "FILE"))
    (tmp_path / "a.txt").write_text("a text")
    for kind, files, split in (("text", "a.txt", "nope"), ("text", "none", "train"), ("json", "a.txt", "train")):
        with pytest.raises(Exception) as caught:
            list(
                datasets.load_dataset(
                    kind, data_files=str(tmp_path / files), split=split, streaming=True, trust_remote_code=False
                )
            )
        assert is_unreachable(caught.value)
