"""Names without local paths, for files that are published: folders of users are nobody else's business."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
_NAMES = ("_name_or_path", "name_or_path")
"""Keys of a config under which transformers notes where a model was loaded from."""


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a model's name on the hub: NAME or OWNER/NAME."""
    return _HUB_NAME.fullmatch(text) is not None


def is_local(model: str | Path) -> bool:
    """Whether a model that a user named is a file or folder here, and not a name."""
    try:
        return Path(model).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def public_model(model: str | Path) -> str:
    """What others may know of where a model was read: its name; of a local path, the last part."""
    hub = hub_name_of(Path(model))
    if hub is not None:
        return hub
    if is_local(model):
        return Path(model).expanduser().resolve().name or "model"
    return str(model) if is_hub_name(str(model)) else last_part(str(model))


def hub_name_of(folder: Path) -> str | None:
    """OWNER/NAME of a folder in the hub's cache; None for any other."""
    for part in folder.parts:
        found = _SNAPSHOT.fullmatch(part)
        if found is not None:
            return f"{found['owner']}/{found['name']}"
    return None


def last_part(path: str) -> str:
    """The last part of a path of any system."""
    return PureWindowsPath(PurePosixPath(path).name).name or "model"


def public_config(config: Any) -> Any:
    """A config, and those inside it, without notes of where a model was loaded from, unless they are hub names."""
    if isinstance(config, list):
        return [public_config(one) for one in config]
    if not isinstance(config, dict):
        return config
    return {
        key: public_config(value)
        for key, value in config.items()
        if key not in _NAMES or (isinstance(value, str) and is_hub_name(value) and not is_local(value))
    }
