"""What transformers (with GPTQModel or compressed-tensors) and MLX compute from our folders, against what we compute.

    python benchmarks/integer_readers.py --format gptq --model smollm2-135m --bits 4 --bits 3 --data wiki.txt
    python benchmarks/integer_readers.py --format compressed-tensors --dtype float32 --bits 4 --grid nvfp4 --grid w8a8

Runs where the reader is installed (`make test-interop-gptq` and `make test-interop-mlx` make such environments). For
each model and bit-width or grid: quantize as `--for` does, export, load, and compare with the same weights, decoded by
fewbit and run by transformers in float32:

- every packed weight, bit for bit, in the dtype in which the reader decodes;
- logits on windows of a text: the mean KL divergence per token must be below LARGEST_KL;
- 24 greedy tokens of 20 prompts, which must be equal except where our two logits are closer than TIE. Each token is
  compared after the tokens that the reader chose before it;
- how fast it generates, on one thread, and the 16-bit model in the same program.

The grid w8a8 (`--method w8a8`) rounds inputs to 8 bits, and reader and fewbit do so at slightly other steps: bounds are
LARGEST_KL_ROUNDED and TIE_ROUNDED.

Rows go to `results/runtimes/integer_readers.json`, for `runtimes_table.py`. Exits with 1 if anything is beyond its
bound.
"""

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runtimes_table import Row, put
from stopwatch import speed_of
from transformers.utils.logging import disable_progress_bar

import fewbit
from fewbit.api import quantize_request
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.formats.config import weights_of
from fewbit.grids.table import GRIDS
from fewbit.runtime.unpack import unpack_modules

LARGEST_KL, TIE = 1e-3, 0.3
LARGEST_KL_ROUNDED, TIE_ROUNDED = 0.1, 2.0
PROMPTS, PROMPT_TOKENS, GREEDY = 20, 24, 24
WIDTHS = {"gptq": (8, 4, 3, 2), "awq": (4,), "mlx": (8, 4, 3, 2), "compressed-tensors": (8, 4, 3, 2)}
TARGETS = {"compressed-tensors": "transformers"}
"""Formats -> what `--for` calls them, where the name is another."""
PACKAGES = {
    "mlx": ("mlx-lm", "mlx"),
    "compressed-tensors": ("transformers", "compressed-tensors", "torch"),
    "gptq": ("gptqmodel", "transformers", "torch"),
    "awq": ("gptqmodel", "transformers", "torch"),
}
RUNTIMES = {"mlx": "mlx-lm", "compressed-tensors": "transformers"}
ROUNDED = "w8a8"


@dataclass(frozen=True)
class Reader:
    """A loaded model.

    logits(ids): float32 `(tokens, vocabulary)` after each of `ids` `(tokens,)`. step(ids, cache): the most likely
    tokens `(sequences,)` after `ids` `(sequences, tokens)`, and the cache with them, which is None at first.
    weights(names): module -> what the reader decodes, `(out, in)`, in the dtype in which it does. names: the modules
    that we packed, for readers that show no difference once they have decoded.
    """

    logits: Callable[[torch.Tensor], torch.Tensor]
    step: Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]
    weights: Callable[[set[str]], dict[str, torch.Tensor]]


def transformers_reader(folder: Path, method: str | None, dtype: str) -> Reader:
    """transformers, with GPTQModel's kernels that are written in PyTorch, which run on every processor."""
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    # Compiling takes minutes, and changes no weights.
    torch._dynamo.config.disable = True
    kernels: dict[str | None, Callable[[], dict[str, Any]]] = {
        None: dict,
        "gptq": lambda: {"quantization_config": GPTQConfig(bits=4, backend="gptq_torch")},
        "awq": lambda: {"quantization_config": AwqConfig(backend="torch_awq")},
        "compressed-tensors": dict,
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kernels[method]()).eval()

    def step(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        found = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1].argmax(dim=-1), found.past_key_values

    def weights(names: set[str]) -> dict[str, torch.Tensor]:
        if method == "compressed-tensors":
            return {name: model.get_submodule(name).weight for name in names}
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
        return {name: _decoded(module, str(method)) for name, module in layers.items()}

    return Reader(lambda ids: model(ids[None]).logits[0].float(), step, weights)


def _decoded(layer: Any, method: str) -> torch.Tensor:
    """The weight of one of GPTQModel's layers."""
    if method == "gptq":
        return layer.dequantize_weight().T
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size).T


def mlx_reader(folder: Path, method: str | None, dtype: str) -> Reader:
    """mlx_lm, on the processor where there is no GPU of Apple's. `dtype` is that of the folder."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.array(model(mx.array(ids[None].numpy())).astype(mx.float32)))[0]

    def step(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        cache = cache or make_prompt_cache(model)
        last = model(mx.array(ids.numpy()), cache=cache)[:, -1]
        return torch.from_numpy(np.array(mx.argmax(last, axis=-1)).astype(np.int64)), cache

    def weights(_: set[str]) -> dict[str, torch.Tensor]:
        found = {}
        for name, layer in model.named_modules():
            if hasattr(layer, "scales"):
                # In 16 bits, MLX rounds the products and the sums.
                wide = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
                weight = mx.dequantize(layer.weight, *wide, layer.group_size, layer.bits)
                found[name] = torch.from_numpy(np.array(weight))
        return found

    return Reader(logits, step, weights)


def same_weights(native: Path, ours: Any, reader: Reader) -> bool:
    """Whether the reader has all packed weights, and decodes them to those of the unpacked model."""
    packed = set(weights_of(open_checkpoint(native)))
    theirs = reader.weights(packed)
    equal = (torch.equal(ours.get_submodule(name).weight.to(one.dtype), one) for name, one in theirs.items())
    return theirs.keys() == packed and all(equal)


@torch.no_grad()
def divergence(ours: Any, theirs: Reader, windows: torch.Tensor) -> dict[str, float]:
    """Perplexities and mean divergence over windows `(windows, tokens)`."""
    losses, others, found = 0.0, 0.0, 0.0
    for ids in windows:
        both = (ours(ids[None]).logits[0], theirs.logits(ids))
        first, second = (torch.log_softmax(one[:-1].double(), dim=-1) for one in both)
        found += float((first.exp() * (first - second)).sum(dim=-1).mean())
        losses, others = (
            total - float(one.gather(1, ids[1:, None]).mean())
            for total, one in zip((losses, others), (first, second), strict=True)
        )
    count = len(windows)
    return {
        "perplexity_ours": math.exp(losses / count),
        "perplexity_reader": math.exp(others / count),
        "kl_mean": found / count,
    }


@torch.no_grad()
def generate(reader: Reader, prompts: torch.Tensor) -> torch.Tensor:
    """Greedy tokens `(prompts, GREEDY)`."""
    token, cache = reader.step(prompts, None)
    found = [token]
    while len(found) < GREEDY:
        token, cache = reader.step(found[-1][:, None], cache)
        found.append(token)
    return torch.stack(found, dim=1)


@torch.no_grad()
def speed(reader: Reader, prompt: torch.Tensor) -> dict[str, float]:
    """How fast tokens follow one prompt `(1, tokens)`, one by one."""
    state = list(reader.step(prompt, None))

    def step() -> None:
        state[:] = reader.step(state[0][:, None], state[1])

    return speed_of(step)


@torch.no_grad()
def gaps(ours: Any, prompts: torch.Tensor, generated: torch.Tensor) -> list[float]:
    """For every generated token that we would not have chosen: by how much our largest logit is larger."""
    ids = torch.cat((prompts, generated[:, :-1]), dim=1)
    logits = ours(ids, logits_to_keep=GREEDY).logits.float()
    behind = logits.max(dim=-1).values - logits.gather(-1, generated[..., None])[..., 0]
    return behind[logits.argmax(dim=-1) != generated].tolist()


def prompts_of(windows: torch.Tensor) -> torch.Tensor:
    """Prompts `(PROMPTS, PROMPT_TOKENS)` from different places of the text."""
    places = ((index % len(windows), index // len(windows) * PROMPT_TOKENS) for index in range(PROMPTS))
    return torch.stack([windows[row, start : start + PROMPT_TOKENS] for row, start in places])


def versions_of(method: str) -> str:
    """Of what reads the format."""
    first, *others = PACKAGES[method]
    return ", ".join([version(first), *(f"{name} {version(name)}" for name in others)])


def choices_of(kind: str, width: str, method: str, group_size: str | None) -> tuple[str, dict[str, Any]]:
    """The method and the choices of `fewbit quantize`. width: bits or the name of a grid."""
    target = {"target": TARGETS.get(kind, kind)}
    if width == ROUNDED:
        return ROUNDED, target
    chosen = {"bits": int(width)} if width.isdigit() else {"grid": width}
    return method, {**target, **chosen, **({"group_size": group_size} if group_size else {})}


def make(model: Path, kind: str, method: str, choices: dict[str, Any], scratch: Path) -> tuple[Path, Path]:
    """The native folder and the exported one."""
    request = quantize_request(model, method, choices)
    fewbit.quantize(model, scratch / "native", request.recipe, request.options)
    fewbit.export(scratch / "native", scratch / "out", kind)
    return scratch / "native", scratch / "out"


def choice_of(native: Path, width: str) -> tuple[float, str]:
    """Bits of codes, and the grid and the group sizes of a folder in words."""
    schemes = [stored.scheme for stored in weights_of(open_checkpoint(native)).values()]
    if not width.isdigit():
        return schemes[0].bits, width
    sizes = sorted({scheme.group_size for scheme in schemes})
    return schemes[0].bits, f"{GRIDS[schemes[0].grid].choice}, groups of {' and '.join(map(str, sizes))}"


def widened(model: str, scratch: Path) -> Path:
    """The model in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = scratch / "wide"
    AutoModelForCausalLM.from_pretrained(locate(model), dtype=torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(locate(model)).save_pretrained(out)
    return out


def measure(
    row: Row, folders: tuple[Path, Path], open_reader: Callable[..., Reader], windows: torch.Tensor, dtype: str | None
) -> tuple[Row, dict[str, float]]:
    """The row with all that is measured, and what is not in it. folders: the native one and the exported one."""
    native, out = folders
    theirs, prompts = open_reader(out, row.format, dtype or "auto"), prompts_of(windows)
    ours = unpack_modules(fewbit.load(native, dtype=torch.float32, device="cpu"))
    behind = gaps(ours, prompts, generate(theirs, prompts))
    found, fast = divergence(ours, theirs, windows), speed(theirs, prompts[:1])
    return replace(
        row,
        runtime=RUNTIMES.get(row.format, "GPTQModel in transformers"),
        version=versions_of(row.format),
        same_weights=same_weights(native, ours, theirs),
        greedy_equal=PROMPTS * GREEDY - len(behind),
        greedy_tokens=PROMPTS * GREEDY,
        greedy_gap=max(behind, default=0.0),
        tokens_per_second=fast["tokens_per_second"],
        load=fast["load"],
        processor_seconds=fast["processor_seconds"],
        bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        note=f"KL {found['kl_mean']:.1e}",
    ), {**found, **fast}


def said(row: Row, found: dict[str, float], bounds: tuple[float, float]) -> tuple[bool, str]:
    """Whether a row is within its bounds, of the divergence and of gaps, and a line that says so."""
    gap = row.greedy_gap or 0.0
    passed = bool(row.same_weights) and found["kl_mean"] < bounds[0] and gap < bounds[1]
    return passed, (
        f"{'passed' if passed else 'FAILED'}: weights {'bit-equal' if row.same_weights else 'UNEQUAL'}; "
        f"perplexity {found['perplexity_reader']:.3f}, ours {found['perplexity_ours']:.3f}; "
        f"KL {found['kl_mean']:.1e} (bound {bounds[0]:g}); "
        f"{row.greedy_equal} of {row.greedy_tokens} greedy tokens equal, largest gap {gap:.2g} ({bounds[1]}); "
        f"{row.tokens_per_second:.1f} tokens/s"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", required=True, choices=WIDTHS)
    parser.add_argument("--model", action="append")
    parser.add_argument(
        "--float32", action="store_true", help="convert the model before: MLX is slow in 16 bits on CPUs"
    )
    parser.add_argument("--bits", action="append")
    parser.add_argument("--grid", action="append", default=[], help=f"of compressed-tensors: fp8, nvfp4, {ROUNDED} ...")
    parser.add_argument("--group-size")
    parser.add_argument("--method", default="adpq+")
    parser.add_argument("--data", default="topics")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of a window")
    parser.add_argument("--dtype", help="in which transformers loads GPTQ and AWQ; default: what the folder says")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "runtimes")
    choices = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    kind, good = choices.format, True
    reader = mlx_reader if kind == "mlx" else transformers_reader
    for model in choices.model or ["smollm2-135m"]:
        with tempfile.TemporaryDirectory() as scratch:
            source = widened(model, Path(scratch)) if choices.float32 else Path(locate(model))
            name = f"{model} in float32" if choices.float32 else model
            protocol = Protocol(sequence_length=choices.tokens, windows=choices.windows)
            windows, _ = read_windows(source, read_text(choices.data), protocol)
            plain = speed(reader(source, None, choices.dtype or "auto"), prompts_of(windows)[:1])
            for width in [*(choices.bits or (() if choices.grid else map(str, WIDTHS[kind]))), *choices.grid]:
                method, flat = choices_of(kind, width, choices.method, choices.group_size)
                folders = make(source, kind, method, flat, Path(scratch))
                choice = choice_of(folders[0], width)
                row, found = measure(Row(kind, *choice, "", "", name, True), folders, reader, windows, choices.dtype)
                row = replace(row, to_16_bits=plain["processor_seconds"] / found["processor_seconds"])
                put("integer_readers", [row], choices.results)
                bounds = (LARGEST_KL_ROUNDED, TIE_ROUNDED) if width == ROUNDED else (LARGEST_KL, TIE)
                passed, line = said(row, found, bounds)
                good = good and passed
                print(f"{name} {kind} {width}: {line}", flush=True)
                for folder in folders:
                    shutil.rmtree(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
