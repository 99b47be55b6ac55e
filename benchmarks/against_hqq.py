"""adpq+ against HQQ, data-free both, in one run on the named models: perplexity, bits from bytes, seconds.

    pip install --no-deps hqq termcolor   (0.2.8 was used)
    python benchmarks/against_hqq.py --model smollm2-135m --model gemma3-270m

HQQ quantizes the same linear layers in groups of 64 with its defaults on the CPU; its bits count its packed codes (3
bits take 3.2), a 16-bit scale and a 16-bit zero a group. Protocol as in zero_shot_quality.py.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fewbit
from fewbit.checkpoints.locate import locate
from fewbit.evaluation.perplexity import Protocol

HERE = Path(__file__).parent
TEXT = HERE / "../../shared/data/wikitext2_raw_test.txt"
PROTOCOL = Protocol(1024, 24)
GROUP = 64


def hqq(model: str, bits: int, out: Path) -> dict[str, Any]:
    """Quantize with HQQ, write the decoded weights as a plain folder, say what it took."""
    from hqq.core.quantize import Quantizer
    from transformers import AutoTokenizer

    loaded = fewbit.load(model, device="cpu")
    began, size, weights = time.perf_counter(), 0, 0
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            codes, meta = Quantizer.quantize(module.weight.data, nbits=bits, group_size=GROUP, device="cpu")
            # Its scales and zeros are computed in float32 and stored in 16 bits.
            size += codes.nbytes + 2 * (meta["scale"].numel() + meta["zero"].numel())
            weights += module.weight.numel()
            module.weight.data = Quantizer.dequantize(codes, meta).to(module.weight.dtype).view(module.weight.shape)
    seconds = time.perf_counter() - began
    loaded.save_pretrained(out)
    AutoTokenizer.from_pretrained(locate(model)).save_pretrained(out)
    return {"seconds": seconds, "bits_per_weight": 8 * size / weights}


def ours(model: str, bits: int, out: Path) -> dict[str, Any]:
    """Quantize with adpq+."""
    report = fewbit.quantize(model, out, fewbit.preset("adpq+", bits=bits, embedding_bits=16))
    return {"seconds": report["run"]["seconds"], "bits_per_weight": report["output"]["bits_per_weight"]}


def main() -> None:
    """Measure both tools at 4 and 3 bits on every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "against_hqq.json")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.model:
        for bits in (4, 3):
            for tool, run in (("hqq", hqq), ("adpq+", ours)):
                with tempfile.TemporaryDirectory() as scratch:
                    out = Path(scratch) / "out"
                    row = {"model": model, "bits": bits, "tool": tool, **run(model, bits, out)}
                    row["perplexity"] = fewbit.evaluate(out, TEXT, PROTOCOL)["models"][0]["perplexity"]
                rows.append(row)
                figures = f"{row['bits_per_weight']:.3f} bits  {row['perplexity']:8.2f}  {row['seconds']:5.1f} s"
                print(f"{model} {bits} {tool:6} {figures}", flush=True)
    arguments.results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
