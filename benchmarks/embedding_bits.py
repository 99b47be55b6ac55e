"""What quantized embeddings and heads cost: bits of the layers x bits of the embeddings, without data.

    python benchmarks/embedding_bits.py --model smollm2-135m --model gemma3-270m --bits 4 --bits 3

`--data` is the raw test split of WikiText-2. Layers are quantized once, and then run with the embeddings of each width:
both are what `fewbit quantize` writes. Prints rows of a Markdown table; the figures go to a JSON file.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fewbit
from fewbit.checkpoints.locate import locate
from fewbit.evaluation.perplexity import Protocol, Totals
from fewbit.evaluation.score import window_logits
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.runtime.unpack import unpack_modules
from fewbit.sizes import show_size

HERE = Path(__file__).parent
TEXT = HERE / "../../shared/data/wikitext2_raw_test.txt"
KEPT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--bits", type=int, action="append", required=True)
    parser.add_argument("--embedding-bits", type=int, action="append", help="default: 16, 8, 6 and 4")
    parser.add_argument("--method", default="adpq+")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--data", type=Path, default=TEXT)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "embedding_bits.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    protocol = Protocol(512, arguments.windows)
    for model in arguments.model:
        widths = arguments.embedding_bits or [KEPT, 8, 6, 4]
        for row in measure(model, arguments.method, arguments.bits, widths, arguments.data, protocol):
            results.append({"windows": arguments.windows, "sequence_length": 512, **row})
            print(
                f"| {model} | {row['bits']} | {row['embedding_bits']} | {row['bits_per_weight']:.2f} | "
                f"{row['bits_per_weight_all']:.2f} | {show_size(row['bytes'])} | {row['kl_mean']:.4f} | "
                f"{row['perplexity']:.2f} | {100 * row['top1_agreement']:.1f} % |",
                flush=True,
            )
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")


def measure(
    model: str, method: str, bits: list[int], widths: list[int], data: Path, protocol: Protocol
) -> list[dict[str, Any]]:
    """A row for every pair of widths."""
    with tempfile.TemporaryDirectory() as scratch:
        layers = {}
        for width in bits:
            made = quantize(model, Path(scratch) / f"layers-{width}", method, width, KEPT)
            layers[width] = unpack_modules(fewbit.load(made, device="cpu"))
        original = fewbit.load(model, device="cpu")
        tables = {KEPT: ends(original)}
        for width in widths:
            if width != KEPT:
                # The grid of an embedding does not depend on the method.
                tables[width] = ends(
                    fewbit.load(quantize(model, Path(scratch) / f"{width}", "rtn", 4, width), device="cpu")
                )
    totals = {(width, table): Totals() for width in bits for table in widths}
    windows, _ = read_windows(locate(model), read_text(data), protocol)
    for window in windows:
        expected = window_logits(original, window)
        for (width, table), total in totals.items():
            for module, weight in zip(modules(layers[width]), tables[table], strict=True):
                module.weight.data = weight
            total.add(window_logits(layers[width], window), window[1:], expected)
    rows = []
    for (width, table), total in totals.items():
        planned = fewbit.plan(model, method, bits=width, embedding_bits=table)["output"]
        rows.append(
            {
                "model": model,
                "method": method,
                "bits": width,
                "embedding_bits": table,
                **{key: planned[key] for key in ("bits_per_weight", "bits_per_weight_all", "bytes")},
                "kl_mean": float(torch.cat(total.divergences).double().mean()),
                "perplexity": math.exp(total.nll / total.tokens),
                "top1_agreement": total.same_top / total.tokens,
            }
        )
    return rows


def quantize(model: str, out: Path, method: str, bits: int, embedding_bits: int) -> Path:
    """Quantize in a process of its own, which takes its memory with it."""
    command = [sys.executable, "-m", "fewbit.cli", "quantize", model, str(out), "--method", method]
    command += ["--bits", str(bits), "--embedding-bits", str(embedding_bits), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def modules(model: Any) -> list[Any]:
    """The embeddings and the head."""
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def ends(model: Any) -> list[torch.Tensor]:
    """The weights of embeddings and head, decoded; a tied head shares those of the embeddings."""
    first, last = (module.weight.detach().as_subclass(torch.Tensor) for module in modules(model))
    return [first, first if model.config.tie_word_embeddings else last]


if __name__ == "__main__":
    main()
