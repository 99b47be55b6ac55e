"""Methods without data on the two named models, with few windows: what costs less than what, and that a model speaks.

The text is one that every Python has. Where the texts of the benchmarks are at hand, a few of their figures are checked
too, to what processors differ by; docs/benchmarks.md and docs/experiments.md have them all.
"""

from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, needs_shared

import fewbit
from fewbit.checkpoints.source import open_checkpoint
from fewbit.evaluation.perplexity import Protocol
from fewbit.pipeline.run import RunOptions
from fewbit.recipe_choices import recipe_from_choices

pytestmark = pytest.mark.real_model
WIKITEXT = SHARED / "wikitext2_raw_test.txt"
FEW = Protocol(128, 4)
# Where a comparison needs no more, only the first five blocks are quantized.
BEHIND_THE_FIFTH = ("model.layers.[5-9].*", "model.layers.1[0-9].*", "model.layers.2[0-9].*")


def quantized(model: str, folder: Path, method: str, **choices: Any) -> Path:
    # Embeddings are kept: the figures are those of the layers.
    recipe = recipe_from_choices(method, {"embedding_bits": 16, **choices})
    fewbit.quantize(model, folder, recipe, RunOptions(overwrite=True))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2-135M by rounding and by adpq+, at several widths."""
    root = tmp_path_factory.mktemp("smollm2")
    made = {f"adpq+ {bits}": quantized("smollm2-135m", root / f"{bits}", "adpq+", bits=bits) for bits in (4, 3)}
    made["adpq+ 8"] = quantized("smollm2-135m", root / "8", "adpq+", bits=8, exclude=BEHIND_THE_FIFTH)
    for bits, size in ((4, "64"), (3, "32")):
        made[f"rtn {bits}"] = quantized("smollm2-135m", root / f"rtn{bits}", "rtn", bits=bits, group_size=size)
    return made


def test_what_bits_cost_on_smollm2(folders: dict[str, Path]) -> None:
    rows = fewbit.evaluate(list(folders.values()), "topics", FEW, "smollm2-135m")["models"]
    found = dict(zip(folders, rows, strict=True))
    ratio = {name: row["perplexity_ratio"] for name, row in found.items()}
    bits = {name: row["bits_per_weight"] for name, row in found.items()}
    assert 0.98 < ratio["adpq+ 8"] < 1.02 and found["adpq+ 8"]["kl_mean"] < 0.01
    assert ratio["adpq+ 8"] < ratio["adpq+ 4"] < ratio["rtn 4"] < 2 < ratio["rtn 3"]
    assert ratio["adpq+ 3"] < 0.8 * ratio["rtn 3"]
    assert bits["adpq+ 3"] < bits["rtn 3"] < 3.7 and bits["adpq+ 4"] < 4.6
    assert found["adpq+ 4"]["top1_agreement"] > found["adpq+ 3"]["top1_agreement"] > found["rtn 3"]["top1_agreement"]


def test_gemma3_and_adpq_plus_against_rounding_at_equal_bytes(tmp_path: Path) -> None:
    ours = quantized("gemma3-270m", tmp_path / "ours", "adpq+", bits=3, exclude=BEHIND_THE_FIFTH[:2])
    rounding = {"bits": 3, "group_size": "32", "exclude": BEHIND_THE_FIFTH[:2]}
    rounded = quantized("gemma3-270m", tmp_path / "rounded", "rtn", **rounding)
    one, other = fewbit.evaluate([ours, rounded], "topics", Protocol(128, 2))["models"]
    assert one["bits_per_weight"] < other["bits_per_weight"]
    assert one["perplexity"] < other["perplexity"]


@needs_shared
def test_figures_on_wikitext(folders: dict[str, Path]) -> None:
    # Two windows of 1,024 tokens. Sums in another order, on another processor, moved these by less than 1 %.
    models = ["smollm2-135m", folders["adpq+ 3"]]
    rows = fewbit.evaluate(models, WIKITEXT, Protocol(1024, 2))["models"]
    assert [row["perplexity"] for row in rows] == pytest.approx([20.25, 31.82], rel=0.015)


def test_a_sentence_at_4_bits(folders: dict[str, Path]) -> None:
    assert len(open_checkpoint(folders["adpq+ 4"]).config["quantization_config"]["weights"]) == 210
    model = fewbit.load(folders["adpq+ 4"])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["adpq+ 4"])
    # The likeliest first word by far (0.76, the next 0.05), so that sums in another order do not change it.
    ids = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(tokens[0]).startswith("The capital of France is Paris")
