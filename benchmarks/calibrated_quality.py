"""Every preset on the named models with the same calibration text: bits on disk, perplexity, KL, seconds, peak memory.

    python benchmarks/calibrated_quality.py --folder /somewhere/with/space --model smollm2-135m --bits 2 --seed 0

Curvatures (input Gram on the original's inputs, output Fisher) are measured once a seed, kept in the folder and reused
for every preset and bit-width; a killed run goes on from the rows in `results/calibrated_quality.json`. Calibration:
128 sequences of 512 tokens of C4. Perplexity: WikiText-2 raw test, 24 windows of 1,024 tokens; KL on 8 of them.
Groups of 64 on smollm2-135m, of 128 on gemma3-270m, unless a row says otherwise.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fewbit
from fewbit.curvature.choice import CurvatureChoice
from fewbit.evaluation.perplexity import Protocol
from fewbit.linear import is_native
from fewbit.memory import keep_freed_memory

HERE = Path(__file__).parent
TEXT = HERE / "../../shared/data/wikitext2_raw_test.txt"
C4 = HERE / "../../shared/data/c4_rp_sample1.jsonl"
GROUP = {"smollm2-135m": "64", "gemma3-270m": "128"}
METHODS = [
    *["rtn", "adpq", "adpq+", "gptq", "awq", "spqr", "precal+gptq", "precal+spqr"],
    *["oac", "oac+spqr", "precal+oac", "billm", "oac+billm"],
    *["oac --gram-share 0", "oac+spqr --gram-share 0", "precal+oac --gram-share 0"],
    "oac+billm --gram-share 0.5",
]


def command(*arguments: Any) -> dict[str, Any]:
    """What a fewbit command prints with --json, run in a process of its own, so that its peak memory is its own."""
    done = subprocess.run(
        [sys.executable, "-m", "fewbit.cli", *map(str, arguments), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return json.loads(done.stdout)


def curvature(model: str, wanted: CurvatureChoice, seed: int, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a measured curvature, and what measuring it took."""
    share = ["--gram-share", wanted.gram_share]
    out = folder / f"{model}-{wanted.kind}{'-mixed' if wanted.gram_share else ''}-{seed}"
    figures = out.with_suffix(".json")
    if not figures.exists():
        print(f"measuring {out.name} …", flush=True)
        text = ["--calibration", C4.resolve(), "--samples", 128, "--sequence-length", 512, "--seed", seed]
        figures.write_text(json.dumps(command("curvature", model, out, "--kind", wanted.kind, *share, *text)))
    return out, json.loads(figures.read_text())


def quantize(
    model: str, method: str, bits: int, seed: int, folder: Path, out: Path, group_size: str = ""
) -> dict[str, Any]:
    """Make one row's folder; what it took, with the share of the curvature. method: a preset, and options."""
    size = group_size or ("64" if method == "adpq+" else GROUP[model])
    choices: list[Any] = ["--overwrite", "--embedding-bits", 16]
    choices += [] if "billm" in method else ["--bits", bits, "--group-size", f"{size},auto"]
    before = {"seconds": 0.0, "peak_rss_bytes": 0}
    preset, *options = method.split()
    share = options[options.index("--gram-share") + 1] if "--gram-share" in options else ""
    wanted = fewbit.preset(preset).curvature
    if wanted is not None and share:
        wanted = replace(wanted, gram_share=float(share))
    if wanted is not None:
        kept, before = curvature(model, wanted, seed, folder)
        choices += ["--curvature", kept]
    report = command("quantize", model, out, "--method", preset, *options, *choices)["report"]
    return {
        "model": model,
        "method": method,
        "bits": bits,
        "seed": seed,
        "group_size": report["recipe"]["group_size"],
        "bits_per_weight": report["output"]["bits_per_weight"],
        "solve_seconds": report["run"]["seconds"],
        "curvature_seconds": before["seconds"],
        "peak_rss_bytes": max(report["run"]["peak_rss_bytes"], before["peak_rss_bytes"]),
        "cores": len(os.sched_getaffinity(0)),
        "bfloat16_products": is_native(torch.bfloat16),
    }


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, choices=GROUP)
    parser.add_argument("--bits", type=int, action="append", required=True)
    parser.add_argument("--seed", type=int, action="append", required=True)
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "calibrated_quality.json")
    arguments = parser.parse_args()
    keep_freed_memory()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    done = {(r["model"], r["method"], r["bits"], r["seed"]) for r in rows}
    for model in arguments.model:
        for seed in arguments.seed:
            for bits in arguments.bits:
                batch: list[tuple[dict[str, Any], Path]] = []
                for method in arguments.method or METHODS:
                    actual = 1 if "billm" in method else bits
                    if (model, method, actual, seed) in done:
                        continue
                    out = arguments.folder / f"out-{model}-{method.replace(' ', '')}-{actual}"
                    batch.append((quantize(model, method, actual, seed, arguments.folder, out), out))
                    done.add((model, method, actual, seed))
                if not batch:
                    continue
                folders = [out for _, out in batch]
                perplexities = fewbit.evaluate(folders, TEXT, Protocol(1024, 24))["models"]
                distances = fewbit.evaluate(folders, TEXT, Protocol(1024, 8), reference=model)["models"]
                for (row, out), found, distance in zip(batch, perplexities, distances, strict=True):
                    row.update(perplexity=found["perplexity"], kl_mean=distance["kl_mean"])
                    rows.append(row)
                    figures = f"{row['bits_per_weight']:.3f} bits  {row['perplexity']:10.2f}"
                    print(f"{model} seed {seed} {row['bits']} {row['method']:12} {figures}", flush=True)
                    shutil.rmtree(out)
                arguments.results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
