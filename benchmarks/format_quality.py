"""Files that fewbit fills in the formats of other tools against those of the formats' own quantizers, at equal size.

    python benchmarks/format_quality.py --format gptq --model smollm2-135m --bits 3 --method precal+oac --curvature DIR
    python benchmarks/format_quality.py --format mlx --model smollm2-135m --bits 4 --python mlx/bin/python
    python benchmarks/format_quality.py --table

The same grid parameters in every row of a format: bits, groups (64 on smollm2-135m, on gemma3-270m 128, and 64 for
MLX), scales of 16 bits. `--python`: an interpreter with MLX, whose own rounding (`run_other_tool.py`) is then
measured. GPTQModel's own figures (its AWQ too) come from `against_calibrated_tools.py`. Curvatures: `fewbit curvature
MODEL DIR --calibration c4_rp_sample1.jsonl --samples 128 --sequence-length 512`. Perplexity: WikiText-2 raw test, 24
windows of 1,024 tokens.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from calibrated_quality import HERE, TEXT

import fewbit
from fewbit.api import quantize_request
from fewbit.checkpoints.locate import locate
from fewbit.evaluation.perplexity import Protocol
from fewbit.memory import keep_freed_memory

RESULTS = HERE / "results" / "format_quality.json"
GROUPS = {
    ("smollm2-135m", "gptq"): 64,
    ("smollm2-135m", "awq"): 64,
    ("smollm2-135m", "mlx"): 64,
    ("gemma3-270m", "gptq"): 128,
    ("gemma3-270m", "mlx"): 64,
    ("gemma3-270m", "transformers"): 128,
}
KEYS = ("model", "format", "bits", "group_size", "method")


def ours(case: dict[str, Any], curvature: Path | None, out: Path) -> None:
    """The folder whose weights the format holds without loss."""
    choices = {"target": case["format"], "bits": case["bits"], "group_size": str(case["group_size"])}
    own = {"curvature": str(curvature)} if curvature else {}
    request = quantize_request(case["model"], case["method"], {**choices, **own})
    fewbit.quantize(case["model"], out, request.recipe, request.options)


def theirs(case: dict[str, Any], python: Path, scratch: Path, out: Path) -> None:
    """What MLX's own rounding decodes to."""
    torch.save(torch.zeros(1, 1), scratch / "tokens.pt")
    command = [python, HERE / "run_other_tool.py", "mlx", locate(case["model"]), scratch / "tokens.pt", out]
    subprocess.run([str(part) for part in (*command, case["bits"], case["group_size"], 0)], check=True)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| model | format | bits | groups of | filled by | perplexity |", "| --- | --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: (row["model"], row["format"], -row["bits"], -row["perplexity"])):
        lines.append("| " + " | ".join(str(row[key]) for key in KEYS) + f" | {row['perplexity']:,.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("gptq", "awq", "mlx", "transformers"), default="gptq")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--bits", type=int, action="append")
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--curvature", type=Path)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    choices = parser.parse_args()
    keep_freed_memory()
    rows = json.loads(choices.results.read_text()) if choices.results.exists() else []
    for bits in choices.bits or ():
        for method in (*choices.method, *(["MLX's own rounding"] if choices.python else [])):
            size = GROUPS[choices.model, choices.format]
            case = dict(zip(KEYS, (choices.model, choices.format, bits, size, method), strict=True))
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch, "out")
                if method in fewbit.PRESETS:
                    needs = fewbit.preset(method).curvature is not None
                    ours(case, choices.curvature if needs else None, out)
                else:
                    theirs(case, choices.python, Path(scratch), out)
                case["perplexity"] = fewbit.evaluate(out, TEXT, Protocol(1024, 24), device="cpu")["models"][0][
                    "perplexity"
                ]
            rows = [row for row in rows if any(row[key] != case[key] for key in KEYS)]
            rows.append(case)
            choices.results.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps(case), flush=True)
    if choices.table:
        print(table(rows))


if __name__ == "__main__":
    main()
