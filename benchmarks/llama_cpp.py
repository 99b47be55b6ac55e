"""Whether llama.cpp computes from our .gguf files what we compute from the same weights.

    python benchmarks/llama_cpp.py --data wiki.txt --model smollm2-135m --model gemma3-270m --grid q4_0 --grid iq4_nl

For each model and grid: quantize, export without rounding anything else, and compare llama.cpp (the wheel `xllamacpp`,
in an environment that this script makes) with transformers in float32 on the weights of the native folder. With --file
FILE.gguf, that file is compared, as `fewbit import` reads it:

- perplexity on the same windows. llama.cpp rounds the inputs of quantized layers to 8 bits. So it also reads a file
  with the same weights decoded to float32, with which it rounds nothing: this must differ by less than 0.1 % from ours.
  The quantized file itself must differ by less than 1 % and two standard errors over windows;
- our model with the inputs of quantized layers rounded to 8 bits in blocks as llama.cpp rounds them. Other rounding
  errors in between lead to other codes, so this only shows how large such a difference is;
- 24 greedy tokens of 20 prompts, which must be equal except where our two largest logits nearly tie. llama.cpp rounds
  activations to 8 bits, so that logits differ; a tie is near within TIE. Each token is compared after the tokens that
  llama.cpp chose before it;
- the tokens of a text.

And how fast llama.cpp generates, on one thread, beside the 16-bit model (--grid none) if that comes before in the run.
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
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import fewbit
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_tokenizer, read_windows
from fewbit.formats.config import weights_of
from fewbit.linear import use_fast_products
from fewbit.runtime.unpack import unpack_modules

HERE = Path(__file__).parent
LARGEST_DIFFERENCE = 0.01
"""Of perplexities, with inputs that llama.cpp rounds to 8 bits."""
LARGEST_WITHOUT_ROUNDING = 0.001
TIE = 1.0
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
    return list(run_llama_cpp(python, model, str(file))["answers"])


def run_llama_cpp(python: Path, model: Path, asked: str) -> dict[str, Any]:
    """What `llama_cpp_runner.py` prints."""
    done = subprocess.run([python, HERE / "llama_cpp_runner.py", model, asked], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llama.cpp failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


@torch.no_grad()
def our_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Float32 logits after each token."""
    return model(torch.tensor([tokens])).logits[0].float()


def round_inputs(model: Any, kinds: dict[str, str]) -> list[Any]:
    """Round the inputs of layers to 8 bits as llama.cpp does for their types; returns the hooks.

    The head has the type of the embeddings, if those are tied. A block has 32 weights and a float16 scale, with
    k-quants 256 and a float32 scale.
    """

    def hook(size: int, dtype: torch.dtype) -> Any:
        def rounded(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            blocks = inputs[0].reshape(-1, size)
            scale = blocks.abs().amax(dim=1, keepdim=True) / 127
            codes = (blocks / scale.masked_fill(scale == 0, 1.0)).round()
            return ((codes * scale.to(dtype).float()).view(inputs[0].shape),)

        return rounded

    found = []
    table = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    for name, module in model.named_modules():
        if module is model.get_output_embeddings() and model.config.get_text_config().tie_word_embeddings:
            name = table
        kind = kinds.get(f"{name}.weight")
        if kind is not None and module is not model.get_input_embeddings():
            nested = kind.endswith(("_k", "_xs"))
            found.append(
                module.register_forward_pre_hook(hook(*((256, torch.float32) if nested else (32, torch.float16))))
            )
    return found


def grids_of(folder: Path) -> dict[str, str]:
    """Names of quantized tensors -> their grids."""
    checkpoint = open_checkpoint(folder)
    weights = weights_of(checkpoint) if checkpoint.is_native else {}
    return {stored.tensor_name(module): stored.scheme.grid for module, stored in weights.items()}


def losses(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The negative log-likelihood of every token but the first, and every most likely token, of all windows."""
    nll, top = [], []
    for row in ids:
        logits = our_logits(model, row.tolist())
        nll.append(torch.nn.functional.cross_entropy(logits[:-1].double(), row[1:], reduction="none"))
        top.append(logits.argmax(dim=1))
    return torch.cat(nll), torch.cat(top)


def prompts_of(ids: torch.Tensor) -> list[list[int]]:
    """PROMPTS prompts from different places of windows `(windows, tokens)`. Raises ValueError if they do not fit."""
    each = math.ceil(PROMPTS / len(ids))
    step = min(64, ids.shape[1] // each)
    if step < PROMPT_TOKENS:
        raise ValueError(f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens need more than {len(ids)} windows")
    return [ids[i % len(ids), i // len(ids) * step :][:PROMPT_TOKENS].tolist() for i in range(PROMPTS)]


def nll_of(answers: list[dict[str, Any]]) -> torch.Tensor:
    """llama.cpp's losses of all windows, one after the other."""
    return torch.tensor([value for answer in answers for value in answer["nll"]], dtype=torch.float64)


def decoded_file(model: Any, tokenizer: Any, scratch: Path) -> Path:
    """The weights of an unpacked model, in float32, as a .gguf file."""
    facts = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config = AutoConfig.for_model(**facts)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(scratch / "plain")
    tokenizer.save_pretrained(scratch / "plain")
    fewbit.export(scratch / "plain", scratch / "decoded")
    return scratch / "decoded" / "decoded.gguf"


def standard_error(differences: torch.Tensor, windows: int) -> float:
    """Of the mean of differences between losses; those within a window depend on each other."""
    return float(differences.view(windows, -1).mean(dim=1).std() / windows**0.5)


def compare(folder: Path, file: Path, data: str, windows: int, python: Path) -> dict[str, Any]:
    """The comparison of a native folder and its .gguf file, as a row of results."""
    text = read_text(data)
    ids, _ = read_windows(folder, text, Protocol(sequence_length=512, windows=windows))
    prompts = prompts_of(ids)
    tokenizer = read_tokenizer(folder)
    said = tokenizer.decode(ids[0], skip_special_tokens=True)
    requests = [{"tokens": row.tolist()} for row in ids] + [{"tokens": one, "greedy": GREEDY} for one in prompts]
    requests.append({"tokens": prompts[0], "text": said})
    model = unpack_modules(fewbit.load(folder, dtype=torch.float32, device="cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        answers = ask(python, file, requests, Path(scratch))
        decoded = nll_of(
            ask(python, decoded_file(model, tokenizer, Path(scratch)), requests[: len(ids)], Path(scratch))
        )
    use_fast_products(model)
    theirs = nll_of(answers[: len(ids)])
    their_top = torch.tensor([token for answer in answers[: len(ids)] for token in answer["top"]])
    ours, top = losses(model, ids)
    unequal: list[float] = []
    for prompt, answer in zip(prompts, answers[len(ids) :], strict=False):
        chosen = answer["generated"]
        logits = our_logits(model, prompt + chosen[:-1])[len(prompt) - 1 :]
        for step, token in enumerate(chosen):
            if int(logits[step].argmax()) != token:
                unequal.append(float(logits[step].max() - logits[step][token]))
    hooks = round_inputs(model, grids_of(folder))
    rounded, _ = losses(model, ids)
    for hook in hooks:
        hook.remove()
    row = {
        "perplexity": math.exp(ours.mean()),
        "perplexity_8_bit_inputs": math.exp(rounded.mean()),
        "perplexity_llama_cpp": math.exp(theirs.mean()),
        "perplexity_llama_cpp_float32": math.exp(decoded.mean()),
        "difference_float32": math.expm1((decoded - ours).mean()),
        "difference": math.expm1((theirs - ours).mean()),
        "standard_error": standard_error(theirs - ours, len(ids)),
        "difference_8_bit_inputs": math.expm1((theirs - rounded).mean()),
        "standard_error_8_bit_inputs": standard_error(theirs - rounded, len(ids)),
        "top1_agreement": float((top == their_top).double().mean()),
        "greedy_tokens": PROMPTS * GREEDY,
        "greedy_unequal": len(unequal),
        "greedy_largest_gap": max(unequal, default=0.0),
        "same_tokens": answers[-1]["tokens"] == tokenizer(said).input_ids,
        "bytes": file.stat().st_size,
    }
    row["within"] = (
        abs(row["difference_float32"]) < LARGEST_WITHOUT_ROUNDING
        and abs(row["difference"]) < LARGEST_DIFFERENCE + 2 * row["standard_error"]
        and row["greedy_largest_gap"] < TIE
        and row["same_tokens"]
    )
    return row


def speed(python: Path, file: Path, plain: float | None) -> dict[str, Any]:
    """Columns of a row. plain: the processor's seconds for a token with the 16-bit model."""
    found = run_llama_cpp(python, file, "--speed")
    return {
        "tokens_per_second": found["tokens_per_second"],
        "processor_seconds": found["decode_seconds"],
        "to_16_bits": plain / found["decode_seconds"] if plain else None,
        "load": found["load"],
    }


def said(row: dict[str, Any]) -> str:
    """The row in one line, with its bounds."""
    return (
        f"{'passed' if row['within'] else 'FAILED'}: perplexity {row['perplexity_llama_cpp']:.3f}, "
        f"{row['difference']:+.2%} of ours (bound {LARGEST_DIFFERENCE:.0%} and twice {row['standard_error']:.2%}); "
        f"the same weights as float32 {row['difference_float32']:+.4%} ({LARGEST_WITHOUT_ROUNDING:.1%}); "
        f"{row['greedy_unequal']} of {row['greedy_tokens']} greedy tokens unequal, "
        f"largest gap {row['greedy_largest_gap']:.2f} ({TIE}); "
        f"a text's tokens {'equal' if row['same_tokens'] else 'UNEQUAL'}; {row['tokens_per_second']:.1f} tokens/s"
    )


def main() -> None:
    """Compare, and write a JSON file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="topics")
    parser.add_argument("--model", action="append")
    parser.add_argument("--grid", action="append", help="grids; none: the 16-bit model")
    parser.add_argument("--method", default="rtn")
    parser.add_argument(
        "--file", type=Path, action="append", help="a .gguf file to compare as it is, whatever --grid and --method say"
    )
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--environment", type=Path, default=HERE / "../.venv-llama-cpp")
    parser.add_argument("--out", type=Path, default=HERE / "results/llama_cpp.json")
    choices = parser.parse_args()
    python = environment(choices.environment)
    before = json.loads(choices.out.read_text()) if choices.out.exists() else {}
    # The table of docs/exports.md has the rows of models, and not those of given files.
    kept = {part: before.get(part, {}) if before.get("wheel") == WHEEL else {} for part in ("rows", "files")}
    good = True
    disable_progress_bar()
    plain: float | None = None

    def measure(part: str, name: str, folder: Path, file: Path) -> dict[str, Any]:
        row = {**compare(folder, file, choices.data, choices.windows, python), **speed(python, file, plain)}
        method = {"method": choices.method} if part == "rows" else {}
        kept[part][name] = {**method, "windows": choices.windows, **row}
        print(f"{name}: {said(row)}", flush=True)
        choices.out.write_text(json.dumps({"wheel": WHEEL, **kept}, indent=1) + "\n")
        return row

    for file in choices.file or []:
        with tempfile.TemporaryDirectory() as scratch:
            fewbit.import_model(file, Path(scratch) / "native")
            good &= measure("files", file.stem, Path(scratch) / "native", file)["within"]
    for model in [] if choices.file else choices.model or ["smollm2-135m"]:
        plain = None
        for grid in choices.grid or ["none", "q4_0"]:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(locate(model))
                if grid != "none":
                    folder = Path(scratch) / "native"
                    fewbit.quantize(model, folder, choices.method, grid=grid, embedding_bits=16)
                fewbit.export(folder, Path(scratch) / "out")
                row = measure("rows", f"{model} {grid}", folder, Path(scratch) / "out" / "out.gguf")
            plain = row["processor_seconds"] if grid == "none" else plain
            good &= row["within"]
    print(f"llama.cpp: {'passed' if good else 'FAILED'}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
