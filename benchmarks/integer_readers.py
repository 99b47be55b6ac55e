"""Whether GPTQModel (through transformers) and MLX compute from our folders what we compute from the same weights.

    fewbit quantize smollm2-135m native --method rtn --bits 4 --grid symmetric --group-size 64 --embedding-bits 16
    fewbit export native exported --format gptq
    python benchmarks/integer_readers.py --native native --exported exported --data wiki.txt --windows 4

Runs where the reader is installed: `gptqmodel` and `optimum` for GPTQ and AWQ, `mlx`, `mlx-cpu` and `mlx-lm` for MLX
(on Linux: `mlx[cpu]`). Compares logits with those of the native folder, decoded and computed in float32: perplexity of
both, and the mean KL divergence per token, which must be below 0.001 unless the reader computes in bfloat16. Prints one
JSON object, and exits with 1 if the divergence is larger.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewbit
from fewbit.checkpoints.json_file import read_json
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.runtime.unpack import unpack_modules

LARGEST_KL = 1e-3
Reader = Callable[[torch.Tensor], torch.Tensor]
"""Logits `(tokens, vocabulary)` of one window."""


def transformers_reader(folder: Path, method: str, dtype: str) -> Reader:
    """transformers with GPTQModel's kernels that are written in PyTorch, which run on every processor."""
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    # Compiling takes minutes, and changes no weights.
    torch._dynamo.config.disable = True
    kernels: dict[str, Any] = {
        "gptq": lambda: GPTQConfig(bits=4, backend="gptq_torch"),
        "awq": lambda: AwqConfig(backend="torch_awq"),
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=kernels[method]())
    return lambda ids: model(ids[None]).logits[0].float()


def mlx_reader(folder: Path) -> Reader:
    """mlx_lm, on the processor where there is no GPU of Apple's."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return lambda ids: torch.from_numpy(np.array(model(mx.array(ids[None].numpy())).astype(mx.float32)))[0]


@torch.no_grad()
def compare(ours: Reader, theirs: Reader, windows: torch.Tensor) -> dict[str, float]:
    """Perplexities and mean divergence over windows `(windows, tokens)`."""
    losses, others, divergence = 0.0, 0.0, 0.0
    for ids in windows:
        first, second = (torch.log_softmax(reader(ids)[:-1].double(), dim=-1) for reader in (ours, theirs))
        divergence += float((first.exp() * (first - second)).sum(dim=-1).mean())
        losses, others = (
            total - float(one.gather(1, ids[1:, None]).mean())
            for total, one in zip((losses, others), (first, second), strict=True)
        )
    count = len(windows)
    return {
        "perplexity_ours": math.exp(losses / count),
        "perplexity_reader": math.exp(others / count),
        "kl_mean": divergence / count,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", type=Path, required=True)
    parser.add_argument("--exported", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a window; MLX takes seconds for each without a GPU")
    parser.add_argument("--dtype", default="float16", help="in which transformers loads GPTQ and AWQ")
    choices = parser.parse_args()
    described = (read_json(choices.exported / "config.json") or {})["quantization_config"]
    method = described.get("quant_method", "mlx")
    protocol = Protocol(sequence_length=choices.tokens, windows=choices.windows)
    windows, _ = read_windows(choices.native, read_text(choices.data), protocol)
    model = unpack_modules(fewbit.load(choices.native, dtype=torch.float32, device="cpu"))
    is_mlx = method == "mlx"
    theirs = mlx_reader(choices.exported) if is_mlx else transformers_reader(choices.exported, method, choices.dtype)
    found: dict[str, Any] = {
        "format": method,
        "bits": described["bits"],
        "windows": len(windows),
        "tokens": choices.tokens,
        "versions": {name: version(name) for name in (("mlx", "mlx-lm") if is_mlx else ("gptqmodel", "transformers"))},
        **compare(lambda ids: model(ids[None]).logits[0].float(), theirs, windows),
    }
    print(json.dumps(found))
    return 0 if found["kl_mean"] < LARGEST_KL else 1


if __name__ == "__main__":
    sys.exit(main())
