"""Headers and scales are not read again and again."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import build, logits
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.checkpoints import safetensors_io, source
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import open_checkpoint
from fewbit.pipeline.run import RunOptions
from fewbit.runtime import whole


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [1 << 30, 1 << 15])
@pytest.mark.parametrize(
    ("load", "times"),
    [(lambda folder: fewbit.load(folder, device="cpu"), 2), (AutoModelForCausalLM.from_pretrained, 1)],
)
def test_a_header_is_read_once_to_open_and_once_to_check(
    load: Callable[[Path], Any], times: int, shard_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "model")
    recipe = fewbit.preset("rtn", bits=4, group_size="32")
    fewbit.quantize(tmp_path / "model", tmp_path / "packed", recipe, RunOptions(shard_size=shard_size))
    files = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_size < 1 << 30)
    wanted = logits(fewbit.load(tmp_path / "packed", device="cpu"))
    read: Counter[Path] = Counter()

    def counted(path: Path) -> Any:
        read[path.resolve()] += 1
        return safetensors_io.read_header(path)

    for module in (source, whole):
        monkeypatch.setattr(module, "read_header", counted)
    model = load(tmp_path / "packed")
    assert read == {path.resolve(): times for path in files}
    assert torch.equal(logits(model), wanted)


def test_the_scales_of_an_fp8_tensor_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    fp8 = '{"quant_method": "fp8", "weight_block_size": [32, 32]}'
    (folder / "config.json").write_text(f'{{"model_type": "llama", "quantization_config": {fp8}}}')
    codes = torch.randn(96, 64).to(torch.float8_e4m3fn)
    tensors = {
        f"{name}.weight{end}": t for name in "ab" for end, t in (("", codes.clone()), ("_scale_inv", torch.rand(3, 2)))
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    plain, read = FileReader._read, Counter[str]()

    def counted(self: FileReader, entry: Any, *rest: Any) -> Any:
        read[entry.name] += 1
        return plain(self, entry, *rest)

    monkeypatch.setattr(FileReader, "_read", counted)
    monkeypatch.setattr(safetensors_io, "_AT_ONCE", 640)
    with FileReader() as reader:
        for name in "ab":
            entry = open_checkpoint(folder).entries[f"{name}.weight"]
            parts = [reader.read(entry, first, 1024) for first in range(0, entry.numel, 1024)]
            scale = tensors[f"{name}.weight_scale_inv"].repeat_interleave(32, 0).repeat_interleave(32, 1)
            assert torch.equal(torch.cat(parts).view(96, 64), (codes.float() * scale).bfloat16())
    assert read["a.weight_scale_inv"] == read["b.weight_scale_inv"] == 1
    assert read["a.weight"] > 6
