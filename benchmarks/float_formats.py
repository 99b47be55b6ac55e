"""fp8, mxfp4 and nvfp4: output-adaptive calibration against plain rounding, with the recipes of `--for vllm`.

    python benchmarks/float_formats.py --folder /somewhere/with/space --model smollm2-135m

A row is what `fewbit quantize MODEL OUT --for vllm --grid GRID` holds, with `--method rtn`, without data (adpq+), and
with `--curvature` (precal+oac). The curvature is measured once for all grids, kept in the folder, and found there by
the next run (`--curvature` names another). Calibration: 128 sequences of 512 tokens of C4. Perplexity and KL
divergence from the original: WikiText-2 raw test, windows of 1,024 tokens.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from calibrated_quality import TEXT, curvature

import fewbit
from fewbit.api import quantize_request
from fewbit.evaluation.perplexity import Protocol
from fewbit.memory import keep_freed_memory
from fewbit.recipe import preset

HERE = Path(__file__).parent
GRIDS = ("fp8", "mxfp4", "nvfp4")
METHODS = ("rtn", "adpq+", "precal+oac")


def quantize(model: str, grid: str, method: str, stored: Path | None, out: Path) -> dict[str, Any]:
    """Make a row's folder, in the native format: the weights are those that --for vllm writes."""
    given = {"curvature": stored} if preset(method).curvature is not None else {}
    request = quantize_request(model, method, {"target": "vllm", "grid": grid, **given})
    report = fewbit.quantize(model, out, request.recipe, request.options)
    return {
        "model": model,
        "grid": grid,
        "method": method,
        "bits_per_weight": report["output"]["bits_per_weight"],
        "solve_seconds": report["run"]["seconds"],
    }


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--grid", action="append", choices=GRIDS)
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--curvature", type=Path)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "float_formats.json")
    arguments = parser.parse_args()
    keep_freed_memory()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    done = {(row["model"], row["grid"], row["method"]) for row in rows}
    protocol = Protocol(1024, arguments.windows)
    for model in arguments.model:
        batch: list[tuple[dict[str, Any], Path]] = []
        for grid in arguments.grid or GRIDS:
            for method in arguments.method or METHODS:
                if (model, grid, method) in done:
                    continue
                wanted, stored = preset(method).curvature, arguments.curvature
                if wanted is not None and stored is None:
                    stored, _ = curvature(model, wanted, 0, arguments.folder)
                out = arguments.folder / f"{model}-{grid}-{method}"
                shutil.rmtree(out, ignore_errors=True)
                batch.append((quantize(model, grid, method, stored, out), out))
                print(f"{model} {grid} {method}: quantized", flush=True)
        if not batch:
            continue
        original = model if (model, "none", "original") not in done else None
        found = fewbit.evaluate([*([original] if original else []), *(out for _, out in batch)], TEXT, protocol, model)
        figures = found["models"]
        if original:
            rows.append({"model": model, "grid": "none", "method": "original", "perplexity": figures[0]["perplexity"]})
        for (row, out), one in zip(batch, figures[len(figures) - len(batch) :], strict=True):
            rows.append(
                {**row, "windows": arguments.windows, "perplexity": one["perplexity"], "kl_mean": one["kl_mean"]}
            )
            print(f"{model} {row['grid']} {row['method']}: {one['perplexity']:.3f} {one['kl_mean']:.4f}", flush=True)
            shutil.rmtree(out)
        arguments.results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
