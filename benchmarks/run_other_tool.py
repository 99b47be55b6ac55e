"""Quantize a model with another tool, in that tool's own environment, and write what its weights decode to.

    /other/venv/bin/python benchmarks/run_other_tool.py autoround MODEL_FOLDER TOKENS.pt OUT BITS GROUP_SIZE STEPS

`against_calibrated_tools.py` calls it; fewbit itself is not needed here. TOKENS.pt holds token ids `(samples, length)`.
OUT is a plain folder that transformers loads (of AWQ the packed one, which fewbit reads), with the seconds of the
quantization alone in its `run.json`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def autoround(folder: str, ids: torch.Tensor, bits: int, group_size: int, steps: int) -> tuple[Any, Any, float]:
    """AutoRound with asymmetric grids and `steps` steps of learned rounding a block."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    began = time.perf_counter()
    tool = AutoRound(
        model,
        tokenizer,
        scheme={"bits": bits, "group_size": group_size, "sym": False, "data_type": "int"},
        iters=steps,
        nsamples=ids.shape[0],
        seqlen=ids.shape[1],
        dataset=samples,
        device_map="cpu",
        enable_torch_compile=False,
    )
    found = tool.quantize()
    model = found[0] if isinstance(found, tuple) else found
    return model, tokenizer, time.perf_counter() - began


def _by_gptqmodel(folder: str, ids: torch.Tensor, backend: str, **choices: Any) -> tuple[Any, float]:
    """GPTQModel's model with its defaults but for some choices, and the seconds that it took."""
    import os

    # Its own default on two cores is one worker, with which it refuses to start.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    model = GPTQModel.load(folder, QuantizeConfig(**choices), device="cpu")
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    began = time.perf_counter()
    model.quantize(samples, batch_size=1, backend=BACKEND(backend))
    return model, time.perf_counter() - began


def gptqmodel(folder: str, ids: torch.Tensor, bits: int, group_size: int, steps: int) -> tuple[Any, Any, float]:
    """GPTQModel with its defaults (symmetric) but for bits and groups."""
    import tempfile

    from transformers import AutoModelForCausalLM

    model, seconds = _by_gptqmodel(folder, ids, "torch", bits=bits, group_size=group_size)
    from gptqmodel import BACKEND, GPTQModel

    with tempfile.TemporaryDirectory() as packed:
        model.save(packed)
        loaded = GPTQModel.load(packed, backend=BACKEND.TORCH, device="cpu").model
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, module in loaded.named_modules():
        if hasattr(module, "dequantize_weight"):
            plain.get_submodule(name).weight.data.copy_(module.dequantize_weight().t())
    return plain, model.tokenizer, seconds


def awq(folder: str, ids: torch.Tensor, bits: int, group_size: int, steps: int) -> tuple[Any, Any, float]:
    """AWQ by GPTQModel, with its defaults (asymmetric) but for bits and groups; what is saved stays packed."""
    choices = {"bits": bits, "group_size": group_size, "method": "awq", "format": "gemm"}
    model, seconds = _by_gptqmodel(folder, ids, "torch_awq", **choices)
    return model, model.tokenizer, seconds


def llmcompressor(folder: str, ids: torch.Tensor, bits: int, group_size: int, steps: int) -> tuple[Any, Any, float]:
    """GPTQ by llm-compressor, with its defaults (symmetric) but for bits and groups."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    samples = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    began = time.perf_counter()
    found = oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict(samples),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
    )
    seconds = time.perf_counter() - began
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    weights_found = {name: tensor for name, tensor in found.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(weights_found)
    return plain, tokenizer, seconds


def mlx(folder: str, ids: torch.Tensor, bits: int, group_size: int, steps: int) -> tuple[Any, Any, float]:
    """MLX's own rounding, as `mlx_lm.convert` does it, of the layers in the blocks; it needs no tokens."""
    import mlx.core as mx
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    began = time.perf_counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            weight = mx.array(module.weight.data.float().numpy()).astype(mx.bfloat16)
            codes, *others = mx.quantize(weight, group_size, bits)
            decoded = mx.dequantize(codes, *(one.astype(mx.float32) for one in others), group_size, bits)
            module.weight = torch.nn.Parameter(torch.from_numpy(np.array(decoded)).float(), requires_grad=False)
    seconds = time.perf_counter() - began
    return model.float(), AutoTokenizer.from_pretrained(folder), seconds


TOOLS = {"autoround": autoround, "gptqmodel": gptqmodel, "awq": awq, "llmcompressor": llmcompressor, "mlx": mlx}


def main() -> None:
    """One run."""
    tool, folder, tokens, out, bits, group_size, steps = sys.argv[1:]
    ids = torch.load(tokens, weights_only=True)
    model, tokenizer, seconds = TOOLS[tool](folder, ids, int(bits), int(group_size), int(steps))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    Path(out, "run.json").write_text(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
