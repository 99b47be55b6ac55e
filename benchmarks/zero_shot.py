"""Time and memory of zero-shot runs against a plain copy of the same checkpoint, in one run, warm cache.

    python benchmarks/zero_shot.py --folder /somewhere/with/space --gigabytes 2 --gigabytes 8

Makes a random bfloat16 checkpoint of LLaMA-7B layer shapes in 1 GB shards, then times `cp -r` and `fewbit quantize`
(a process of its own each time, start-up included) in turn, and prints medians, ratios and peak resident memory.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE = 4096, 11008
SHAPES = {
    **{f"self_attn.{k}_proj": (HIDDEN, HIDDEN) for k in "qkvo"},
    **{f"mlp.{k}_proj": (INTERMEDIATE, HIDDEN) for k in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
METHODS = ["rtn:4", "adpq:4", "adpq+:4", "adpq+:3"]


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Write whole blocks until `gigabytes` are reached; heavy-tailed weights, so that there are outliers."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    written, block, count = 0, 0, 0

    def flush() -> None:
        nonlocal shard, count
        count += 1
        name = f"model-{count:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard = {}

    while written < gigabytes * 1e9:
        for name, shape in SHAPES.items():
            weight = torch.randn(shape, generator=generator) * 0.02
            weight += weight.pow(3) * 200
            shard[f"model.layers.{block}.{name}.weight"] = weight.bfloat16()
            written += 2 * shape[0] * shape[1]
        shard[f"model.layers.{block}.input_layernorm.weight"] = torch.ones(HIDDEN).bfloat16()
        block += 1
        if sum(t.numel() * 2 for t in shard.values()) > 0.9e9:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))


def timed(command: list[str], out: Path) -> tuple[float, int | None]:
    """Seconds of a command, and the peak resident bytes that it reports; what it wrote is removed."""
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds, json.loads(done.stdout)["models"][0]["peak_rss_bytes"] if done.stdout else None


def measure(model: Path, out: Path, methods: list[str], repeats: int) -> list[dict[str, Any]]:
    """Medians over `repeats` rounds; each round runs every command once."""
    commands = {"cp": ["cp", "-r", str(model), str(out)]}
    for choice in methods:
        method, bits = choice.split(":")
        commands[f"{method}, {bits} bits"] = [
            *[sys.executable, "-m", "fewbit.cli", "quantize", str(model), str(out)],
            *["--method", method, "--bits", bits, "--embedding-bits", "16", "--json", "--overwrite"],
        ]
    for path in sorted(model.glob("*.safetensors")):
        path.read_bytes()
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    peak: dict[str, int | None] = {}
    for _ in range(repeats):
        for name, command in commands.items():
            taken, memory = timed(command, out)
            seconds[name].append(taken)
            peak[name] = memory if memory is None else max(peak.get(name) or 0, memory)
    base = statistics.median(seconds["cp"])
    return [
        {
            "what": name,
            "seconds": statistics.median(times),
            "all_seconds": times,
            "times_cp": statistics.median(times) / base,
            "peak_rss_bytes": peak[name],
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    """Measure every size and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, action="append", required=True)
    parser.add_argument("--method", action="append", help=f"METHOD:BITS; default {' '.join(METHODS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "zero_shot.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())["results"] if arguments.results.exists() else []
    for gigabytes in arguments.gigabytes:
        model = arguments.folder / f"fewbit-benchmark-{gigabytes:g}GB"
        if not model.exists():
            make_checkpoint(model, gigabytes)
        size = sum(p.stat().st_size for p in model.glob("*.safetensors"))
        rows = measure(model, arguments.folder / "fewbit-benchmark-out", arguments.method or METHODS, arguments.repeats)
        for row in rows:
            print(
                f"{gigabytes:g} GB  {row['what']:14} {row['seconds']:7.2f} s  {row['times_cp']:5.2f} x cp  "
                f"{(row['peak_rss_bytes'] or 0) / 1e6:7.0f} MB"
            )
        results = [r for r in results if r["bytes"] != size] + [{"bytes": size, "rows": rows}]
        shutil.rmtree(model)
    arguments.results.parent.mkdir(exist_ok=True)
    host = {"cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    arguments.results.write_text(json.dumps({"host": host, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
