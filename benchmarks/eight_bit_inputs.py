"""What 8-bit weights with 8-bit inputs cost: `--method w8a8` and `--method smoothquant`, as `--for vllm` makes them.

    python benchmarks/eight_bit_inputs.py --folder /somewhere/with/space --model smollm2-135m --model gemma3-270m

Perplexity and KL divergence from the original: WikiText-2 raw test, windows of 1,024 tokens, inputs rounded as in vLLM.
smoothquant is calibrated on 32 sequences of 512 tokens of C4. "weights only" is 8-bit weights with 16-bit inputs, one
scale for each row.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from calibrated_quality import C4, TEXT

import fewbit
from fewbit.api import quantize_request
from fewbit.evaluation.perplexity import Protocol
from fewbit.memory import keep_freed_memory

HERE = Path(__file__).parent
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "weights only": ("w8a8", {"input_bits": 16, "group_size": "row"}),
    "w8a8": ("w8a8", {}),
    "smoothquant": ("smoothquant", {"calibration": str(C4.resolve()), "samples": 32, "sequence_length": 512}),
}


def main() -> None:
    """Measure every row of the models, and write them into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "eight_bit_inputs.json")
    arguments = parser.parse_args()
    keep_freed_memory()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    for model in arguments.model:
        outs = {name: arguments.folder / f"{model}-{name.replace(' ', '-')}" for name in CHOICES}
        for name, (method, flat) in CHOICES.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            request = quantize_request(model, method, {"target": "vllm", **flat})
            fewbit.quantize(model, outs[name], request.recipe, request.options)
        found = fewbit.evaluate([model, *outs.values()], TEXT, Protocol(1024, arguments.windows), reference=model)
        rows = [row for row in rows if row["model"] != model]
        for name, one in zip(("original", *CHOICES), found["models"], strict=True):
            row = {"model": model, "choice": name, "windows": arguments.windows}
            rows.append({**row, "perplexity": one["perplexity"], "kl_mean": one["kl_mean"]})
            print(f"{model} {name}: {one['perplexity']:.3f} {one['kl_mean']:.4f}", flush=True)
        arguments.results.write_text(json.dumps(rows, indent=1) + "\n")
        for out in outs.values():
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
