"""What GPTQModel (through transformers) and MLX compute from our GPTQ, AWQ and MLX folders, against what we compute.

    python benchmarks/integer_readers.py --format gptq --model smollm2-135m --bits 4 --bits 3 --data wiki.txt

Runs where the reader is installed (`make test-interop-gptq` and `make test-interop-mlx` make such environments). For
each model and bit-width: quantize as `--for` does, export, load, and compare with the same weights, decoded by fewbit
and run by transformers in float32:

- every packed weight, bit for bit, in the dtype in which the reader decodes;
- logits on windows of a text: the mean KL divergence per token must be below LARGEST_KL;
- 24 greedy tokens of 20 prompts, which must be equal except where our two logits are closer than TIE. Each token is
  compared after the tokens that the reader chose before it;
- generated tokens for each second of processor time with one thread, and the same with the 16-bit model.

Rows go to `results/runtimes/integer_readers.json`, for `runtimes_table.py`. Exits with 1 if anything is beyond its
bound.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runtimes_table import Row, put

import fewbit
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.exports.quantize_for import choices_for
from fewbit.exports.table import target_named
from fewbit.formats.config import weights_of
from fewbit.grids.table import GRIDS
from fewbit.recipe_choices import recipe_from_choices
from fewbit.runtime.unpack import unpack_modules

LARGEST_KL, TIE = 1e-3, 0.3
PROMPTS, PROMPT_TOKENS, GREEDY = 20, 24, 24
WIDTHS = {"gptq": (8, 4, 3, 2), "awq": (4,), "mlx": (8, 4, 3, 2)}


@dataclass(frozen=True)
class Reader:
    """A loaded model.

    logits(ids): float32 `(tokens, vocabulary)` after each of `ids` `(tokens,)`. step(ids, cache): the most likely
    tokens `(sequences,)` after `ids` `(sequences, tokens)`, and the cache with them, which is None at first. weights:
    module -> what the reader decodes, `(out, in)`, in the dtype in which it does.
    """

    logits: Callable[[torch.Tensor], torch.Tensor]
    step: Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]
    weights: Callable[[], dict[str, torch.Tensor]]


def transformers_reader(folder: Path, method: str | None, dtype: str) -> Reader:
    """transformers, with GPTQModel's kernels that are written in PyTorch, which run on every processor."""
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    # Compiling takes minutes, and changes no weights.
    torch._dynamo.config.disable = True
    kernels: dict[str | None, Callable[[], dict[str, Any]]] = {
        None: dict,
        "gptq": lambda: {"quantization_config": GPTQConfig(bits=4, backend="gptq_torch")},
        "awq": lambda: {"quantization_config": AwqConfig(backend="torch_awq")},
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kernels[method]()).eval()

    def step(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        found = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1].argmax(dim=-1), found.past_key_values

    def weights() -> dict[str, torch.Tensor]:
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

    def weights() -> dict[str, torch.Tensor]:
        found = {}
        for name, layer in model.named_modules():
            if hasattr(layer, "scales"):
                # In 16 bits, MLX rounds the products and the sums.
                wide = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
                weight = mx.dequantize(layer.weight, *wide, layer.group_size, layer.bits)
                found[name] = torch.from_numpy(np.array(weight))
        return found

    return Reader(logits, step, weights)


def same_weights(native: Path, ours: Any, theirs: dict[str, torch.Tensor]) -> bool:
    """Whether the reader has all packed weights, and decodes them to those of the unpacked model."""
    equal = (torch.equal(ours.get_submodule(name).weight.to(one.dtype), one) for name, one in theirs.items())
    return theirs.keys() == weights_of(open_checkpoint(native)).keys() and all(equal)


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
def tokens_per_second(reader: Reader, prompt: torch.Tensor) -> float:
    """Tokens after one prompt `(1, tokens)` for each second of processor time, without the prompt."""
    token, cache = reader.step(prompt, None)
    seconds = []
    for _ in range(GREEDY):
        began = time.process_time()
        token, cache = reader.step(token[:, None], cache)
        seconds.append(time.process_time() - began)
    # The first ones warm up.
    return 1 / statistics.median(seconds)


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
    first, *others = ("mlx-lm", "mlx") if method == "mlx" else ("gptqmodel", "transformers", "torch")
    return ", ".join([version(first), *(f"{name} {version(name)}" for name in others)])


def make(model: str, method: str, kind: str, bits: int, group_size: str | None, scratch: Path) -> tuple[Path, Path]:
    """The native folder and the exported one."""
    flat = {"bits": bits, **({"group_size": group_size} if group_size else {})}
    flat, _ = choices_for(target_named(kind), model, flat)
    fewbit.quantize(model, scratch / "native", recipe_from_choices(method, {**flat, "sets": ()}))
    fewbit.export(scratch / "native", scratch / "out", kind)
    return scratch / "native", scratch / "out"


def choice_of(native: Path) -> str:
    """The grid and the group sizes of a folder, in words."""
    schemes = [stored.scheme for stored in weights_of(open_checkpoint(native)).values()]
    sizes = sorted({scheme.group_size for scheme in schemes})
    return f"{GRIDS[schemes[0].grid].choice}, groups of {' and '.join(map(str, sizes))}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", required=True, choices=WIDTHS)
    parser.add_argument("--model", action="append")
    parser.add_argument("--bits", type=int, action="append")
    parser.add_argument("--group-size")
    parser.add_argument("--method", default="adpq+")
    parser.add_argument("--data", default="topics")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of a window")
    parser.add_argument("--dtype", help="in which transformers loads GPTQ and AWQ; default: what the folder says")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "runtimes")
    choices = parser.parse_args()
    torch.set_num_threads(1)
    kind, good = choices.format, True
    reader = mlx_reader if kind == "mlx" else transformers_reader
    for model in choices.model or ["smollm2-135m"]:
        protocol = Protocol(sequence_length=choices.tokens, windows=choices.windows)
        windows, _ = read_windows(locate(model), read_text(choices.data), protocol)
        prompts = prompts_of(windows)
        plain = tokens_per_second(reader(Path(locate(model)), None, choices.dtype or "auto"), prompts[:1])
        for bits in choices.bits or WIDTHS[kind]:
            with tempfile.TemporaryDirectory() as scratch:
                native, out = make(model, choices.method, kind, bits, choices.group_size, Path(scratch))
                theirs = reader(out, kind, choices.dtype or "auto")
                ours = unpack_modules(fewbit.load(native, dtype=torch.float32, device="cpu"))
                behind = gaps(ours, prompts, generate(theirs, prompts))
                found = divergence(ours, theirs, windows)
                row = Row(
                    *(kind, bits, choice_of(native)),
                    *("mlx-lm" if kind == "mlx" else "GPTQModel in transformers", versions_of(kind), model, True),
                    same_weights=same_weights(native, ours, theirs.weights()),
                    greedy_equal=PROMPTS * GREEDY - len(behind),
                    greedy_tokens=PROMPTS * GREEDY,
                    greedy_gap=max(behind, default=0.0),
                    tokens_per_second=tokens_per_second(theirs, prompts[:1]),
                    tokens_per_second_16_bit=plain,
                    bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
                    note=f"KL {found['kl_mean']:.1e}",
                )
            put("integer_readers", [row], choices.results)
            within = row.same_weights and found["kl_mean"] < LARGEST_KL and max(behind, default=0.0) < TIE
            good = good and bool(within)
            print(f"{model} {kind} {bits} bits: {json.dumps({**found, 'within': within, 'gaps': behind})}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
