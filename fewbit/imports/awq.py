"""Read checkpoints of AWQ in the layout "gemm", with four bits.

qweight int32 (in, out / 8)       codes, along the rows in the order 0 2 4 6 1 3 5 7
qzeros  int32 (groups, out / 8)   zero-points in the same order
scales  (groups, out)
"""

from functools import partial

from torch import Tensor

from fewbit.checkpoints.json_in import read_json_object
from fewbit.checkpoints.safetensors_io import TensorEntry
from fewbit.checkpoints.source import Checkpoint
from fewbit.imports.gptq import MADE_WITH
from fewbit.imports.layers import (
    FLOATS,
    WORDS,
    Entries,
    EvenLayer,
    checked,
    each,
    gather,
    middle,
    tensors_of,
    whole,
    with_config,
)
from fewbit.imports.settings import Settings, settings_of
from fewbit.imports.source import Source, check_some_packed
from fewbit.imports.words import from_awq_words

SIDE_FILE = "quant_config.json"
_ENDINGS = ("qweight", "qzeros", "scales")
_BITS, _PER_WORD = 4, 8
_BITS_KEYS, _SIZE_KEYS = ("bits", "w_bit"), ("group_size", "q_group_size")
_KNOWN = {
    *(*_BITS_KEYS, *_SIZE_KEYS, "quant_method", "zero_point", "version", "modules_to_not_convert", "backend"),
    *("do_fuse", "modules_to_fuse", "fuse_max_seq_len", "exllama_config", "meta", "lm_head", "checkpoint_format"),
    *("format", "method", "pack_dtype", "sym", "desc_act"),
}


def open_awq(checkpoint: Checkpoint) -> Source:
    """The tensors of a checkpoint. Raises FewbitError for other layouts, and for what the native format cannot hold."""
    side = checkpoint.folder / SIDE_FILE
    described = checkpoint.config.get("quantization_config")
    settings = settings_of(checkpoint.folder, described or (read_json_object(side) if side.is_file() else None))
    size = _check(settings)
    found, rest = gather(checkpoint, _ENDINGS, "qweight")
    layers = each(checkpoint, found, partial(_layer, size))
    config = with_config(checkpoint)
    tensors = tensors_of(checkpoint, config, layers, rest)
    check_some_packed(tensors, checkpoint.folder)
    facts = {"bits": _BITS, "group_size": size}
    companions = tuple(one for one in checkpoint.companions if one.name != SIDE_FILE)
    return Source(checkpoint.folder, "AWQ", config, tensors, checkpoint.files, companions, checkpoint.left, facts)


def _check(settings: Settings) -> int:
    """The group size."""
    settings.only(_KNOWN | MADE_WITH)
    settings.one_of(next((key for key in _BITS_KEYS if key in settings.values), "bits"), (_BITS,))
    settings.one_of("version", ("gemm", "GEMM"), settings.values.get("checkpoint_format", "gemm"))
    settings.one_of("pack_dtype", ("int32",), "int32")
    settings.empty("desc_act", "AWQ has no act-order")
    return settings.number(next((key for key in _SIZE_KEYS if key in settings.values), "group_size"))


def _layer(size: int, module: str, entries: Entries) -> EvenLayer:
    words, zeros = checked(entries, "qweight", WORDS, 2), checked(entries, "qzeros", WORDS, 2)
    scales = checked(entries, "scales", FLOATS, 2)
    columns, rows = words.shape[0], words.shape[1] * _PER_WORD
    expected = columns if size == -1 else size
    count = columns // expected if expected > 0 and columns % expected == 0 else 0
    if not count or not rows or scales.shape != (count, rows) or zeros.shape != (count, rows // _PER_WORD):
        raise ValueError(
            f"qweight {list(words.shape)}, qzeros {list(zeros.shape)} and scales {list(scales.shape)} do not fit each "
            f"other and groups of {expected}"
        )
    return EvenLayer(
        shape=(rows, columns),
        bits=_BITS,
        group_size=expected,
        scale_dtype=scales.dtype,
        codes=partial(_codes, words),
        scales=partial(_turned, scales),
        zeros=middle(_codes(zeros), _BITS),
    )


def _codes(entry: TensorEntry) -> Tensor:
    return from_awq_words(whole(entry)).t().contiguous()


def _turned(entry: TensorEntry) -> Tensor:
    return whole(entry).t().contiguous()
