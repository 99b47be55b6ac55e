"""Which files are copied together with the weights, and where links in a model's folder may point."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fewbit.checkpoints.adapter import is_adapter_file
from fewbit.checkpoints.own_files import CARD, CONFIG, ORIGINAL_CARD, REPORT, RUN, is_own, is_own_card
from fewbit.errors import FewbitError
from fewbit.printable import printable

TEMPLATES = "additional_chat_templates"
"""The only subfolder that transformers reads with a language model."""

_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx"),
    *(".onnx_data", ".npz", ".npy", ".ot", ".tflite", ".mlmodel", ".mlpackage", ".nemo", ".llamafile", ".engine"),
    *(".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z"),
}
"""Weights in some form, pickle files, and archives that may contain either."""
_CODE = {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".ipynb", ".exe", ".bat", ".cu", ".cpp"}
_WRITTEN = (CONFIG, REPORT, RUN)
"""Names of files that every output has: copies of others would replace them, also where case makes no difference."""
_SCRATCH = (".safetensors.json", ".index.json", ".solved", ".states", ".partial")
_UNTOLD = {".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store", "__pycache__"}
_SAID = 8


@dataclass(frozen=True)
class Companion:
    """A file to copy: its path, and its name relative to the folder, with `/` between the parts."""

    path: Path
    name: str


@dataclass(frozen=True)
class Companions:
    """Files that are copied together with the weights, and the names of files that are not."""

    carried: tuple[Companion, ...]
    left: tuple[str, ...]


def find_companions(folder: Path, read: Iterable[Path]) -> Companions:
    """Sort the files of a model's folder, other than those in `read`, into those that are copied and those that are
    not.

    Everything is copied except weights, code, files with names that the output needs, and subfolders that transformers
    does not read. Reports and cards that fewbit wrote itself are in neither list. The card of an original is copied
    under another name, since the output has one of its own. Raises FewbitError and names a link that points
    out of the folder.
    """
    read = set(read)
    carried, left = [], []
    for path in sorted(folder.iterdir()):
        if path in read or path.name in _UNTOLD:
            continue
        if path.name in (REPORT, RUN):
            check_link(folder, path)
            if is_own(path):
                continue
        if path.is_dir():
            if path.name != TEMPLATES:
                left.append(f"{printable(path.name)}/")
                continue
            check_link(folder, path)
            for inner in sorted(path.iterdir()):
                name = f"{TEMPLATES}/{inner.name}"
                if inner.is_file() and inner.suffix == ".jinja" and printable(name) == name:
                    check_link(folder, inner)
                    carried.append(Companion(inner, name))
                else:
                    left.append(printable(name))
        elif path.is_file() and path.name.lower() == CARD.lower():
            check_link(folder, path)
            if not is_own_card(path):
                carried.append(Companion(path, _other_name(folder)))
        elif path.is_file() and _is_carried(path):
            check_link(folder, path)
            carried.append(Companion(path, path.name))
        else:
            left.append(printable(path.name))
    return Companions(tuple(carried), tuple(left))


def check_link(folder: Path, path: Path) -> None:
    """Raises FewbitError if a file of a model's folder is a link to a place outside.

    Links in the hub's cache point from `snapshots/REVISION` to the `blobs` of the same repository; these are followed.
    """
    if not path.is_symlink():
        return
    here, there = folder.resolve(), path.resolve()
    if not any(there.is_relative_to(place) for place in _allowed(here)):
        raise FewbitError(
            f"{folder}: {printable(str(path.relative_to(folder)))} is a link to a place outside the model's folder: "
            "replace it with the file itself"
        )


def _other_name(folder: Path) -> str:
    """A name for the card of an original that no other file of its folder has, however the file system takes case."""
    stem, ending = ORIGINAL_CARD.rsplit(".", 1)
    taken = {path.name.lower() for path in folder.iterdir()}
    names = [ORIGINAL_CARD, *(f"{stem}-{number}.{ending}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name.lower() not in taken)


def _allowed(folder: Path) -> Iterator[Path]:
    yield folder
    if folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir():
        yield folder.parent.parent / "blobs"


def _is_carried(path: Path) -> bool:
    name = path.name
    if name.lower() in _WRITTEN or is_adapter_file(name) or name.startswith("."):
        return False
    if name.endswith(_SCRATCH) or printable(name) != name:
        return False
    return path.suffix.lower() not in _WEIGHTS | _CODE


def say_left(left: Iterable[str]) -> str | None:
    """One line that lists the files that are not copied, or None if there are none."""
    names = list(left)
    if not names:
        return None
    more = f" and {len(names) - _SAID} more" if len(names) > _SAID else ""
    return f"not copied from the model's folder: {', '.join(names[:_SAID])}{more}"
