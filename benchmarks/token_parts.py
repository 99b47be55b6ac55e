"""What the time of a token of a packed model goes to, on one thread of the CPU.

    fewbit quantize smollm2-135m FOLDER --bits 4
    python benchmarks/token_parts.py FOLDER

Milliseconds, least of the tries: a whole token; its packed layers with what calls them; their kernels alone, in the
order of the model, so that weights come from memory; the same with each layer repeated, so that caches hold them; the
head. And microseconds of the kernel for one weight of each shape, repeated. To compare two versions of fewbit, run it
with each in PYTHONPATH, in turns.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

import fewbit
from fewbit.runtime.kernels.description import room
from fewbit.runtime.packed_linear import PackedLinear

TRIES = 30


def least(call: Callable[[], Any], tries: int = TRIES) -> float:
    """Seconds, least of some tries."""
    found = []
    for _ in range(tries):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def kernel_of(layer: PackedLinear, x: torch.Tensor) -> Callable[[], Any]:
    """The layer's product with one input, without what is around its kernel."""
    form = layer.ready._prepared.form  # type: ignore[union-attr]
    out, work = torch.empty(form.shape[0], dtype=x.dtype), torch.empty(room(form, 1), dtype=torch.uint8)

    def run() -> None:
        form.run(form.address, x.data_ptr(), 1, out.data_ptr(), len(out), 0, len(out), 0, work.data_ptr())

    return run


@torch.inference_mode()
def measure(folder: str) -> dict[str, Any]:
    """Milliseconds of the parts, and microseconds of each shape of weight."""
    torch.set_num_threads(1)
    model = fewbit.load(folder, device="cpu")
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    inputs = {size: torch.randn(1, 1, size, dtype=model.dtype) for size in {layer.in_features for layer in layers}}
    hidden = torch.randn(1, 1, model.config.get_text_config().hidden_size, dtype=model.dtype)
    out = model(torch.arange(100, 116)[None], use_cache=True)
    token, head = out.logits[:, -1:].argmax(-1), model.get_output_embeddings()
    kernels = [kernel_of(layer, inputs[layer.in_features]) for layer in layers]
    repeated = [least(kernel) for kernel in kernels]
    shapes = {(layer.out_features, layer.in_features): seconds for layer, seconds in zip(layers, repeated, strict=True)}
    seconds = {
        "token": least(lambda: model(token, past_key_values=out.past_key_values, use_cache=True)),
        "layers": least(lambda: [layer(inputs[layer.in_features]) for layer in layers]),
        "kernels": least(lambda: [kernel() for kernel in kernels]),
        "kernels, repeated": sum(repeated),
        "head": least(lambda: head(hidden)),
    }
    return {
        "milliseconds": {name: round(1e3 * one, 2) for name, one in seconds.items()},
        "microseconds": {f"{rows} x {columns}": round(1e6 * one, 1) for (rows, columns), one in shapes.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    print(json.dumps(measure(parser.parse_args().folder)))
