"""Write a 16-bit copy of a checkpoint that is stored as codes and scales, for other programs to read."""

import hashlib
import json
import shutil
from pathlib import Path

from fewbit.checkpoints.cache import build_once, cache_folder
from fewbit.checkpoints.safetensors_io import FileReader, ShardWriter, header_room
from fewbit.checkpoints.shards import shard_name, split_by_size
from fewbit.checkpoints.source import Checkpoint
from fewbit.checkpoints.stamps import file_stamp
from fewbit.checkpoints.weight_files import INDEX_NAME
from fewbit.errors import FewbitError

_SHARD = 5_000_000_000


def folder_to_load(checkpoint: Checkpoint) -> Path:
    """A folder from which other programs can read the same weights as fewbit: the model's own, or a copy in the cache.

    The copy is written once for these exact files, one tensor at a time. Raises FewbitError if the disk has too little
    space.
    """
    if not checkpoint.is_products:
        return checkpoint.folder
    target = cache_folder() / "plain" / f"{checkpoint.folder.resolve().name}-{_key(checkpoint)}"
    return build_once(target, lambda out: write_plain(checkpoint, out))


def write_plain(checkpoint: Checkpoint, out: Path, shard_size: int = _SHARD) -> None:
    """Write the tensors of a checkpoint as fewbit reads them, its config, and its other files into the folder `out`."""
    shards = split_by_size(checkpoint.entries.values(), lambda entry: entry.bytes, shard_size)
    needed, free = sum(entry.bytes for entry in checkpoint.entries.values()), shutil.disk_usage(out).free
    if needed > free:
        raise FewbitError(
            f"{out.parent}: the 16-bit copy of {checkpoint.folder} needs {needed / 1e9:.1f} GB, but only "
            f"{free / 1e9:.1f} GB are free: set FEWBIT_CACHE to another folder"
        )
    placed: dict[str, str] = {}
    with FileReader() as reader:
        for index, shard in enumerate(shards):
            name = shard_name(index, len(shards))
            writer = ShardWriter(out / name, header_room([entry.name for entry in shard]))
            for entry in shard:
                writer.copy(entry, reader)
                placed[entry.name] = name
            writer.close()
    if len(shards) > 1:
        listed = {"metadata": {"total_size": needed}, "weight_map": placed}
        (out / INDEX_NAME).write_text(json.dumps(listed, ensure_ascii=False), encoding="utf-8")
    for companion in checkpoint.companions:
        (out / companion.name).parent.mkdir(exist_ok=True)
        shutil.copyfile(companion.path, out / companion.name)
    (out / "config.json").write_text(json.dumps(checkpoint.config, ensure_ascii=False), encoding="utf-8")


def _key(checkpoint: Checkpoint) -> str:
    """A key that changes with the config, and with the size, times or inode of any weight file."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for path in checkpoint.files:
        digest.update(f"{path.name} {json.dumps(file_stamp(path))}".encode())
    return digest.hexdigest()[:16]
