"""Why 8 bits change a perplexity at all: the first-order part of the change, and what chance alone would give.

    python benchmarks/first_order.py --model smollm2-135m --method rtn --method adpq --method adpq+

For each method the weights' errors d and the gradient g of the mean loss on the text, float32: predicted change g.d,
its standard deviation if every error had a random sign, sqrt(sum g^2 d^2), and the measured change of the loss. Text
and windows as in eight_bits.py; by default every folder is made with groups of 64.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from calibrated_quality import TEXT

import fewbit
from fewbit.checkpoints.locate import locate
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.runtime.packed_linear import PackedLinear
from fewbit.runtime.unpack import unpack_modules


def loss_of(model: torch.nn.Module, windows: torch.Tensor, backward: bool) -> float:
    """Mean loss of the windows, whose gradients are left in the model."""
    total = 0.0
    for window in windows:
        with torch.set_grad_enabled(backward):
            loss = model(window[None], labels=window[None], use_cache=False).loss / len(windows)
            if backward:
                loss.backward()
        total += float(loss.detach())
    return total


def main() -> None:
    """Print one line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", action="append", required=True)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--group-size", default="64,auto")
    parser.add_argument("--windows", type=int, default=24)
    arguments = parser.parse_args()
    windows, _ = read_windows(locate(arguments.model), read_text(TEXT), Protocol(512, arguments.windows))
    model = fewbit.load(arguments.model, dtype=torch.float32, device="cpu")
    model.requires_grad_(True)
    base = loss_of(model, windows, backward=True)
    for method in arguments.method:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            recipe = fewbit.preset(method, bits=arguments.bits, group_size=arguments.group_size, embedding_bits=16)
            fewbit.quantize(arguments.model, out, recipe)
            rounded = fewbit.load(out, dtype=torch.float32, device="cpu")
            names = [name for name, module in rounded.named_modules() if isinstance(module, PackedLinear)]
            unpack_modules(rounded)
            predicted = variance = error = size = 0.0
            for name in names:
                weight = model.get_submodule(name).weight
                moved = (rounded.get_submodule(name).weight - weight.detach()).double()
                slope = weight.grad.double()
                predicted += float((slope * moved).sum())
                variance += float((slope * moved).square().sum())
                error += float(moved.square().sum())
                size += float(weight.detach().double().square().sum())
            change = loss_of(rounded, windows, backward=False) - base
        print(
            f"{arguments.model} {method:6} relative error {(error / size) ** 0.5:.5f}  first order {predicted:+.4%}  "
            f"chance {variance**0.5:.4%}  measured {change:+.4%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
