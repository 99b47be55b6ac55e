"""Every preset at 8 bits against the original, run in float32: what is left is the error of the weights.

    python benchmarks/eight_bits.py --folder /somewhere/with/space --model smollm2-135m

Curvatures and folder as in calibrated_quality.py. WikiText-2 raw test, windows of 512 tokens from its start. Rows that
stand in `results/eight_bits.json` are not measured again. At most 0.1 % is expected of every method.
"""

import argparse
import json
import shutil
from pathlib import Path

from calibrated_quality import GROUP, HERE, METHODS, TEXT, quantize

import fewbit
from fewbit.evaluation.perplexity import Protocol
from fewbit.memory import keep_freed_memory


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, choices=GROUP)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "eight_bits.json")
    arguments = parser.parse_args()
    keep_freed_memory()
    protocol = Protocol(512, arguments.windows, dtype="float32")
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    for model in arguments.model:
        original = fewbit.evaluate(model, TEXT, protocol)["models"][0]["perplexity"]
        for method in METHODS:
            if "billm" in method or any((r["model"], r["method"]) == (model, method) for r in results):
                continue
            out = arguments.folder / f"eight-{model}-{method}"
            made = quantize(model, method, 8, 0, arguments.folder, out)
            found = fewbit.evaluate(out, TEXT, protocol)["models"][0]["perplexity"]
            shutil.rmtree(out)
            change = found / original - 1
            row = {"model": model, "method": method, "windows": arguments.windows, "original": original}
            results.append({**row, "perplexity": found, "bits_per_weight": made["bits_per_weight"], "change": change})
            arguments.results.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{model} {method:12} {made['bits_per_weight']:.3f} bits  {found:.4f}  {change:+.4%}", flush=True)


if __name__ == "__main__":
    main()
