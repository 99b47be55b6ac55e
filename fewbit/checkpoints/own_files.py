"""The files that only fewbit writes beside the weights, and how they are recognised."""

from pathlib import Path

from fewbit.checkpoints.json_file import read_json

CONFIG, REPORT, RUN = "config.json", "fewbit_report.json", "fewbit_run.json"
CARD, ORIGINAL_CARD = "README.md", "README.original.md"
"""The model card that fewbit writes, and the name under which that of the original is kept."""
CARD_MARK = "<!-- fewbit wrote this card; if you change it, remove this line. -->"
"""A line of the cards that fewbit writes."""
FILES = "files"
"""Key of the file `RUN`: the names of all files that belong to the folder."""
MODEL_FOLDER = "model_folder"
"""Key of the file `RUN` in folders of earlier versions: the folder of the model that the weights were made from."""

_KEYS = {REPORT: ({"fewbit_version", "recipe"}, {"unpacked_from"}), RUN: ({FILES}, {MODEL_FOLDER})}
"""File -> sets of keys; what fewbit wrote has all keys of one of them."""


def is_own(path: Path) -> bool:
    """Whether a file is a report of fewbit, or its list of files, by its content: a name alone proves nothing."""
    if path.name not in _KEYS or not path.is_file():
        return False
    found = read_json(path)
    return isinstance(found, dict) and any(keys <= found.keys() for keys in _KEYS[path.name])


def is_own_card(path: Path) -> bool:
    """Whether fewbit wrote a model card, and no user made it theirs."""
    try:
        return path.is_file() and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
