"""Whether llama.cpp computes from our .gguf files what we compute from the same weights.

    python benchmarks/llama_cpp.py --data wiki.txt --model smollm2-135m --model gemma3-270m --grid q4_0 --grid iq4_nl

For each model and grid: quantize, export without rounding anything else, and compare llama.cpp (the wheel `xllamacpp`,
in an environment that this script makes) with transformers in float32 on the weights of the native folder:

- perplexity on the same windows, which must differ by less than 0.3 %;
- 24 greedy tokens of 20 prompts, which must be equal except where our two largest logits nearly tie. llama.cpp rounds
  activations to 8 bits, so that logits differ; a tie is near within TIE. Each token is compared after the tokens that
  llama.cpp chose before it;
- the tokens of a text.

Exits with 1 if anything is beyond its bound.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

import fewbit
from fewbit.checkpoints.locate import locate
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_tokenizer, read_windows
from fewbit.linear import use_fast_products
from fewbit.runtime.unpack import unpack_modules

HERE = Path(__file__).parent
LARGEST_DIFFERENCE = 0.003
TIE = 0.5
"""Of two logits: 8-bit activations move a difference of logits by up to about this much."""
PROMPTS, PROMPT_TOKENS, GREEDY = 20, 24, 24
WHEEL = "xllamacpp==2026.10.11549"


def environment(folder: Path) -> Path:
    """A Python with llama.cpp in it."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / ".ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", WHEEL], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy"], check=True)
        (folder / ".ready").touch()
    return python


def ask(python: Path, model: Path, requests: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """llama.cpp's answers."""
    file = scratch / "requests.json"
    file.write_text(json.dumps(requests))
    command = [python, HERE / "llama_cpp_runner.py", model, file]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llama.cpp failed: {done.stderr[-2000:]}")
    return list(json.loads(done.stdout.splitlines()[-1])["answers"])


@torch.no_grad()
def our_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Float32 logits after each token."""
    return model(torch.tensor([tokens])).logits[0].float()


def compare(folder: Path, file: Path, data: str, windows: int, python: Path) -> dict[str, Any]:
    """The comparison of a native folder and its .gguf file, as a row of results."""
    text = read_text(data)
    ids, _ = read_windows(folder, text, Protocol(sequence_length=512, windows=windows))
    prompts = [ids[i % len(ids), (i // len(ids)) * 64 :][:PROMPT_TOKENS].tolist() for i in range(PROMPTS)]
    tokenizer = read_tokenizer(folder)
    said = tokenizer.decode(ids[0], skip_special_tokens=True)
    requests = [{"tokens": row.tolist()} for row in ids] + [{"tokens": one, "greedy": GREEDY} for one in prompts]
    requests.append({"tokens": prompts[0], "text": said})
    with tempfile.TemporaryDirectory() as scratch:
        answers = ask(python, file, requests, Path(scratch))
    model = unpack_modules(fewbit.load(folder, dtype=torch.float32, device="cpu"))
    use_fast_products(model)
    ours, theirs, same_top, tops = 0.0, 0.0, 0, 0
    for row, answer in zip(ids, answers, strict=False):
        logits = our_logits(model, row.tolist())
        nll = torch.nn.functional.cross_entropy(logits[:-1].double(), row[1:], reduction="sum")
        ours, theirs = ours + float(nll), theirs + sum(answer["nll"])
        top = logits.argmax(dim=1)
        same_top, tops = same_top + int((top == torch.tensor(answer["top"])).sum()), tops + len(top)
    count = ids.numel() - len(ids)
    unequal: list[float] = []
    for prompt, answer in zip(prompts, answers[len(ids) :], strict=False):
        chosen = answer["generated"]
        logits = our_logits(model, prompt + chosen[:-1])[len(prompt) - 1 :]
        for step, token in enumerate(chosen):
            if int(logits[step].argmax()) != token:
                unequal.append(float(logits[step].max() - logits[step][token]))
    ratio = math.exp((theirs - ours) / count)
    row = {
        "perplexity": math.exp(ours / count),
        "perplexity_llama_cpp": math.exp(theirs / count),
        "difference": ratio - 1,
        "top1_agreement": same_top / tops,
        "greedy_tokens": PROMPTS * GREEDY,
        "greedy_unequal": len(unequal),
        "greedy_largest_gap": max(unequal, default=0.0),
        "same_tokens": answers[-1]["tokens"] == tokenizer(said).input_ids,
        "bytes": file.stat().st_size,
    }
    row["within"] = abs(row["difference"]) < LARGEST_DIFFERENCE and row["greedy_largest_gap"] < TIE
    row["within"] = row["within"] and row["same_tokens"]
    return row


def main() -> None:
    """Compare, and write a JSON file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="topics")
    parser.add_argument("--model", action="append")
    parser.add_argument("--grid", action="append", help="grids; none: the 16-bit model")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--environment", type=Path, default=HERE / "../.venv-llama-cpp")
    parser.add_argument("--out", type=Path, default=HERE / "results/llama_cpp.json")
    choices = parser.parse_args()
    python = environment(choices.environment)
    before = json.loads(choices.out.read_text()) if choices.out.exists() else {}
    rows = before.get("rows", {}) if before.get("wheel") == WHEEL else {}
    good = True
    for model in choices.model or ["smollm2-135m"]:
        for grid in choices.grid or ["none", "q4_0"]:
            with tempfile.TemporaryDirectory() as scratch:
                folder = locate(model)
                if grid != "none":
                    folder = Path(scratch) / "native"
                    fewbit.quantize(model, folder, choices.method, grid=grid)
                fewbit.export(folder, Path(scratch) / "out")
                row = compare(folder, Path(scratch) / "out" / "out.gguf", choices.data, choices.windows, python)
            rows[f"{model} {grid}"] = {"method": choices.method, "windows": choices.windows, **row}
            good = good and row["within"]
            print(f"{model} {grid}: {json.dumps(row)}", flush=True)
            choices.out.write_text(json.dumps({"wheel": WHEEL, "rows": rows}, indent=1) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
