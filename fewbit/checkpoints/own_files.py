"""The files that only fewbit writes beside the weights, and how they are recognised."""

from pathlib import Path

from fewbit.checkpoints.json_file import read_json

CONFIG, REPORT, RUN = "config.json", "fewbit_report.json", "fewbit_run.json"
FILES = "files"
"""Key of the file `RUN`: the names of all files that belong to the folder."""
MODEL_FOLDER = "model_folder"
"""Key of the file `RUN`: the folder of the model that the weights were made from."""

_KEYS = {REPORT: ({"fewbit_version", "recipe"}, {"unpacked_from"}), RUN: ({FILES}, {MODEL_FOLDER})}
"""File -> sets of keys; what fewbit wrote has all keys of one of them."""


def is_own(path: Path) -> bool:
    """Whether a file is a report of fewbit, or its list of files, by its content: a name alone proves nothing."""
    if path.name not in _KEYS or not path.is_file():
        return False
    found = read_json(path)
    return isinstance(found, dict) and any(keys <= found.keys() for keys in _KEYS[path.name])
