"""Our weights against those of llama.cpp's own quantizer with an importance matrix, in the same block types.

    python benchmarks/llama_cpp_quantizer.py --quantizer llama-quantize --folder /somewhere/with/space \
        --model smollm2-135m --grid q4_0 --method adpq+ --method precal+oac

llama-quantize is llama.cpp's program (Debian's package `llama.cpp-tools` has it). Every linear layer of the blocks gets
the same type (`--pure`), embeddings and head are q8_0 in all files. The importance matrix is what llama-imatrix
computes: the mean square of every input of every layer, here from transformers, on 128 sequences of 512 tokens of C4;
our methods with data get as many from the same file. Excess loss: that of the file, read by transformers in float32,
less that of the original, on 24 windows of 1,024 tokens of WikiText-2 (test). The ratio is to their file with the
importance matrix: below 1 is better. llama.cpp-plain is their file without one: adpq+ has no data either. Files have
the same size, but for metadata.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.checkpoints.locate import locate
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows

HERE = Path(__file__).parent
TEXT = HERE / "../../shared/data/wikitext2_raw_test.txt"
C4 = HERE / "../../shared/data/c4_rp_sample1.jsonl"
SAMPLES, LENGTH = 128, 512
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def name_of(model: str) -> str:
    """A name for files: of a folder, its own."""
    return Path(model).name


@torch.no_grad()
def mean_squares(model: str, samples: int) -> dict[str, tuple[torch.Tensor, int]]:
    """GGUF name of a weight -> the sum of squares of each input, and over how many tokens."""
    network = AutoModelForCausalLM.from_pretrained(locate(model), dtype=torch.float32).eval()
    sums: dict[str, tuple[torch.Tensor, int]] = {}

    def count(name: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2)
            before = sums.get(name, (torch.zeros(rows.shape[1]), 0))
            sums[name] = before[0] + rows.square().sum(dim=0), before[1] + len(rows)

        return hook

    for name, module in network.named_modules():
        parts = name.split(".", 3)
        if len(parts) == 4 and parts[3] in NAMES:
            module.register_forward_pre_hook(count(f"blk.{parts[2]}.{NAMES[parts[3]]}.weight"))
    ids, _ = read_windows(locate(model), read_text(C4), Protocol(LENGTH, samples))
    for row in ids:
        network.model(row[None])
    return sums


def write_importance(sums: dict[str, tuple[torch.Tensor, int]], file: Path, samples: int) -> None:
    """An importance matrix as llama-quantize reads it."""
    import gguf

    writer = gguf.GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["c4"])
    writer.add_uint32("imatrix.chunk_count", samples)
    writer.add_uint32("imatrix.chunk_size", LENGTH)
    for name, (squares, tokens) in sums.items():
        writer.add_tensor(f"{name}.in_sum2", squares.numpy().astype(numpy.float32)[None])
        writer.add_tensor(f"{name}.counts", numpy.full((1, 1), tokens, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def their_file(quantizer: str, folder: Path, model: str, grid: str, samples: int) -> Path:
    """The file that llama.cpp's quantizer makes of the model; samples: of the importance matrix, 0 for none."""
    source, importance = folder / f"{name_of(model)}-16", folder / f"{name_of(model)}.imatrix.gguf"
    out = folder / f"{name_of(model)}-{grid}-theirs{'' if samples else '-plain'}.gguf"
    if not source.exists():
        fewbit.export(model, source)
    if samples and not importance.exists():
        write_importance(mean_squares(model, samples), importance, samples)
    eight = ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
    command: list[str | Path] = [
        quantizer,
        "--pure",
        *(("--imatrix", importance) if samples else ()),
        *eight,
        next(source.glob("*.gguf")),
        out,
        grid.upper(),
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama-quantize failed: {done.stderr[-2000:]}")
    return out


def our_file(folder: Path, model: str, grid: str, method: str, samples: int) -> Path:
    """The file that fewbit makes with the same types. The curvature of a model is measured once."""
    out, curvature = folder / f"{name_of(model)}-{grid}-{method}", folder / f"{name_of(model)}-curvature"
    if not out.exists():
        data: dict[str, Any] = {}
        wanted = fewbit.preset(method).curvature
        if wanted is not None:
            if not curvature.exists():
                text = ["--calibration", C4, "--samples", samples, "--sequence-length", LENGTH]
                run = [sys.executable, "-m", "fewbit.cli", "curvature", model, curvature, "--kind", "fisher", *text]
                subprocess.run([*map(str, run), "--gram-share", str(wanted.gram_share)], check=True)
            data = {"curvature": curvature}
        fewbit.quantize(model, out, method, grid=grid, target="llama.cpp", embedding_bits=8, **data)
    return next(out.glob("*.gguf"))


def main() -> None:
    """Compare, and write a JSON file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantizer", default="llama-quantize")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", action="append")
    parser.add_argument("--grid", action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--out", type=Path, default=HERE / "results/llama_cpp_quantizer.json")
    choices = parser.parse_args()
    choices.folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(choices.out.read_text()) if choices.out.exists() else {}
    for model in choices.model or ["smollm2-135m"]:
        for grid in choices.grid or ["q4_0"]:
            files = {
                name: their_file(choices.quantizer, choices.folder, model, grid, samples)
                for name, samples in (("llama.cpp", choices.samples), ("llama.cpp-plain", 0))
            }
            for method in choices.method or ["adpq+", "precal+oac"]:
                files[method] = our_file(choices.folder, model, grid, method, choices.samples)
            for name, row in measured(model, grid, files, choices, results).items():
                results[name] = row
                print(f"{name}: {json.dumps(row)}", flush=True)
            choices.out.write_text(json.dumps(results, indent=1) + "\n")


def measured(
    model: str, grid: str, files: dict[str, Path], choices: argparse.Namespace, known: dict[str, Any]
) -> dict[str, Any]:
    """Rows of results; what is known for the same windows, of files with the same bytes, is kept."""
    names = {method: f"{name_of(model)} {grid} {method}" for method in files}
    stamps = {
        method: {"windows": choices.windows, "samples": choices.samples, "sha256": sha256(file)}
        for method, file in files.items()
    }
    new = [method for method in files if not stamps[method].items() <= known.get(names[method], {}).items()]
    alike = [row for name, row in known.items() if name.split()[0] == name_of(model)]
    original = next((row["perplexity_16_bit"] for row in alike if row["windows"] == choices.windows), None)
    asked = [*([] if original else [model]), *(files[method] for method in new)]
    found: list[float] = []
    if asked:
        rows = fewbit.evaluate(asked, TEXT, Protocol(1024, choices.windows), device="cpu")["models"]
        found = [row["perplexity"] for row in rows]
    original = original or found.pop(0)
    fresh = dict(zip(new, found, strict=True))
    made = {}
    for method, file in files.items():
        perplexity = fresh[method] if method in fresh else known[names[method]]["perplexity"]
        made[names[method]] = {
            "perplexity": perplexity,
            "perplexity_16_bit": original,
            "excess_loss": math.log(perplexity / original),
            "bytes": file.stat().st_size,
            **stamps[method],
        }
    theirs = made[names["llama.cpp"]]["excess_loss"]
    return {name: {**row, "ratio": row["excess_loss"] / theirs} for name, row in made.items()}


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
