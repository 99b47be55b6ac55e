"""On a GPU: what is quantized, measured, trained and run there, against the CPU. Skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import open_checkpoint
from fewbit.formats.config import read_weights
from fewbit.presets import PRESETS
from fewbit.runtime.unpack import read_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TEXT: dict[str, Any] = {"calibration": "random-tokens", "samples": 4, "sequence_length": 32, "max_fallback": 99}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    with FileReader() as reader:
        stored = read_weights(checkpoint.quantization or {})
        return {name: read_weight(checkpoint, reader, name, one) for name, one in stored.items()}


@pytest.mark.parametrize("method", PRESETS)
def test_quantized_there_is_as_good(tiny: Path, tmp_path: Path, method: str) -> None:
    text = TEXT if fewbit.preset(method).curvature else {}
    errors = {}
    for device in ("cpu", "cuda"):
        report = fewbit.quantize(tiny, tmp_path / device, method, device=device, **text)
        errors[device] = [row["relative_squared_error"] for row in report["layers"]]
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.15)
    if not text:
        here, there = weights(tmp_path / "cpu"), weights(tmp_path / "cuda")
        # Sums are rounded otherwise there, so that a tie may fall to the other side.
        moved = [float((here[name] != there[name]).float().mean()) for name in here]
        assert max(moved) < 0.01


@pytest.mark.parametrize("method", ["rtn", "adpq", "adpq+", "billm", "spqr"])
def test_packed_runs_there_as_unpacked(tiny: Path, tmp_path: Path, method: str) -> None:
    text = TEXT if fewbit.preset(method).curvature else {}
    fewbit.quantize(tiny, tmp_path / "out", method, **text)
    ids = torch.arange(24).unsqueeze(0).cuda() + 3
    packed = fewbit.load(tmp_path / "out", device="cuda")(ids).logits
    plain = fewbit.load(fewbit.unpack(tmp_path / "out", tmp_path / "plain"), device="cuda")(ids).logits
    # The same weights; sums in another order, rounded to bfloat16.
    assert float((packed - plain).norm() / plain.norm()) < 0.01
    here = fewbit.load(tmp_path / "out", device="cpu")(ids.cpu()).logits
    assert float((packed.cpu() - here).norm() / here.norm()) < 0.02


@pytest.mark.parametrize("train", ["all", "scales", "codes"])
def test_trained_there(tiny: Path, tmp_path: Path, train: str) -> None:
    fewbit.quantize(tiny, tmp_path / "start", "adpq+", bits=2)
    text = {name: value for name, value in TEXT.items() if name != "max_fallback"}
    report = fewbit.tune(
        tmp_path / "start",
        tmp_path / "out",
        train=train,
        epochs=2,
        batch_size=1,
        held_out=1,
        reference=str(tiny),
        device="cuda",
        **text,
    )
    history = report["tuning"]["history"]
    assert min(history["held_out"]) <= history["held_out"][0]
    ids = torch.arange(24).unsqueeze(0).cuda() + 3
    assert bool(torch.isfinite(fewbit.load(tmp_path / "out", device="cuda")(ids).logits).all())


def test_evaluated_there(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 200)
    found = [fewbit.evaluate(tiny, text, windows=2, seq_len=32, dtype="float32", device=d) for d in ("cpu", "cuda")]
    here, there = (one["models"][0]["perplexity"] for one in found)
    assert there == pytest.approx(here, rel=1e-3)


def packed_and_plain(tiny: Path, tmp_path: Path, bits: int, **options: Any) -> tuple[Any, Any]:
    """The packed model and the same unpacked, both on the GPU."""
    pytest.importorskip("triton", reason="needs triton: pip install 'fewbit[triton]'")
    fewbit.quantize(tiny, tmp_path / "out", "adpq+", bits=bits)
    plain = fewbit.load(fewbit.unpack(tmp_path / "out", tmp_path / "plain"), device="cuda", **options)
    return fewbit.load(tmp_path / "out", device="cuda", **options), plain


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_few_tokens_there(tiny: Path, tmp_path: Path, bits: int) -> None:
    packed, plain = packed_and_plain(tiny, tmp_path, bits)
    for tokens in (1, 5, 16):
        ids = torch.arange(tokens).unsqueeze(0).cuda() + 3
        found, wanted = packed(ids).logits, plain(ids).logits
        assert float((found - wanted).norm() / wanted.norm()) < 0.02
    layer = packed.model.layers[0].mlp.up_proj
    assert layer.ready._prepared.kernel.name == "triton"


def test_generation_with_a_static_cache_there(tiny: Path, tmp_path: Path) -> None:
    packed, plain = packed_and_plain(tiny, tmp_path, 4, dtype=torch.float32)
    ids = torch.arange(20).unsqueeze(0).cuda() + 3
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = plain.generate(ids, **settings)
    assert torch.equal(packed.generate(ids, **settings), wanted)
    assert torch.equal(packed.generate(ids, cache_implementation="static", **settings), wanted)


def test_a_captured_step_there(tiny: Path, tmp_path: Path) -> None:
    """A CUDA graph of a step follows its inputs, and no step waits for the GPU."""
    packed, _ = packed_and_plain(tiny, tmp_path, 3)
    layer, head, table = packed.model.layers[0].mlp.down_proj, packed.lm_head, packed.model.embed_tokens
    ids, x = torch.tensor([[7]]).cuda(), torch.randn(1, 1, layer.in_features).cuda().to(layer.like.dtype)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return layer(x), head(table(ids))

    with torch.inference_mode():
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for token in (3, 90):
            ids.fill_(token)
            x.copy_(torch.randn_like(x))
            graph.replay()
            for found, wanted in zip(captured, step(), strict=True):
                assert torch.equal(found, wanted)
