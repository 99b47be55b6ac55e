"""Seconds and peak memory of calibrated presets, against the passes over the text that they cannot do without.

    python benchmarks/calibrated.py --model smollm2-135m --samples 32

In one run: a plain forward pass over the sequences, a plain forward and backward pass with all gradients, and every
preset end to end in a process of its own, start-up and loading included. Ratios are against the passes it needs: two
forward passes for the input Gram, one forward and backward pass for the output Fisher. Zero-shot `adpq` is there for a
published comparison: how many times faster it is than `awq` and `spqr` is printed at the end. Rows of other presets
stay in the results as they are.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.tokens import make_set
from fewbit.checkpoints.locate import locate

HERE = Path(__file__).parent
C4 = HERE / "../../shared/data/c4_rp_sample1.jsonl"
PRESETS = [
    *["adpq:4", "adpq+:3", "gptq:4", "awq:4", "spqr:3", "billm:1", "precal+gptq:3", "precal+spqr:3"],
    *["oac:3", "oac+spqr:3", "oac+billm:1", "precal+oac:3"],
    *["oac --gram-share 0:3", "precal+oac --gram-share 0:3"],
]
LENGTH = 512


def passes(model: str, samples: int, backward: bool) -> dict[str, float]:
    """Seconds of a plain forward pass, and with `backward` of a plain forward and backward pass, over the sequences."""
    from transformers import AutoTokenizer

    loaded = fewbit.load(model, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(locate(model))
    choice = CalibrationChoice(str(C4.resolve()), samples, LENGTH)
    ids = make_set(choice, tokenizer, loaded.get_input_embeddings().weight.shape[0]).ids
    with torch.inference_mode():
        loaded(ids[:1], use_cache=False)
        began = time.perf_counter()
        for sequence in ids:
            loaded(sequence[None], use_cache=False)
        forward = time.perf_counter() - began
    if not backward:
        return {"forward": forward}
    loaded.requires_grad_(True)
    began = time.perf_counter()
    for sequence in ids:
        loaded(sequence[None], labels=sequence[None], use_cache=False).loss.backward()
        loaded.zero_grad()
    return {"forward": forward, "forward_backward": time.perf_counter() - began}


def preset(model: str, method: str, bits: str, samples: int) -> dict[str, Any]:
    """One preset end to end."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        method, *more = method.split()
        command = [sys.executable, "-m", "fewbit.cli", "quantize", model, str(out), "--method", method, "--bits", bits]
        command += ["--embedding-bits", "16"]
        command += ["--json", *more]
        if fewbit.preset(method).curvature is not None:
            command += ["--calibration", str(C4.resolve()), "--samples", str(samples)]
            command += ["--sequence-length", str(LENGTH)]
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        seconds = time.perf_counter() - began
        shutil.rmtree(out)
    return {"seconds": seconds, "peak_rss_bytes": json.loads(done.stdout)["models"][0]["peak_rss_bytes"]}


def main() -> None:
    """Measure and write the results of one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--preset", action="append", help=f"METHOD:BITS; default {' '.join(PRESETS)}")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "calibrated_speed.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    wanted = [tuple(text.split(":")) for text in arguments.preset or PRESETS]
    kinds = {method: fewbit.preset(method.split()[0]).curvature for method, _ in wanted}
    fisher = any(choice is not None and choice.kind == "fisher" for choice in kinds.values())
    base = passes(arguments.model, arguments.samples, fisher)
    print("plain passes: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in base.items()), flush=True)
    before = results.get(arguments.model, {"rows": []})
    rows = [row for row in before["rows"] if (row["method"], str(row["bits"])) not in wanted]
    for method, bits in wanted:
        row = {"method": method, "bits": int(bits), **preset(arguments.model, method, bits, arguments.samples)}
        row["samples"], row["passes"] = arguments.samples, base
        choice, ratio = kinds[method], ""
        if choice is not None:
            needed = base["forward_backward"] if choice.kind == "fisher" else 2 * base["forward"]
            row["times_needed_passes"] = row["seconds"] / needed
            ratio = f"{row['times_needed_passes']:5.2f} x its passes"
        rows.append(row)
        print(f"{method:14} {row['seconds']:7.1f} s  {row['peak_rss_bytes'] / 1e9:5.2f} GB  {ratio}", flush=True)
        results[arguments.model] = {"rows": rows}
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    taken = {row["method"]: row["seconds"] for row in rows if row["samples"] == arguments.samples}
    for method in {"awq", "spqr"} & taken.keys() if "adpq" in taken else ():
        print(f"adpq is {taken[method] / taken['adpq']:.0f} times faster than {method}")


if __name__ == "__main__":
    main()
