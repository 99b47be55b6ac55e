"""A forward pass of 16-bit weights: torch's own products, widened ones, and the model in float32; medians, in one run.

    python benchmarks/products.py --model smollm2-135m

Tells what `fewbit.linear` is worth on this processor. On one with bfloat16 products of its own nothing is widened.
"""

import argparse
import statistics
import time

import torch

import fewbit
from fewbit import linear


def seconds(model: torch.nn.Module, ids: torch.Tensor, repeats: int) -> float:
    """Median over repeats, after one that is not counted."""
    found = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            model(ids, use_cache=False)
            found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def main() -> None:
    """Print the three, and their ratios to torch's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    ids = torch.randint(0, 40_000, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    print(f"bfloat16 products of its own: {linear.is_native(torch.bfloat16)}; {torch.get_num_threads()} threads")
    model = fewbit.load(arguments.model, device="cpu")
    chosen = linear.is_native
    took = {}
    for name, native in (("torch's own", True), ("widened", False)):
        linear.is_native = lambda dtype, native=native: native  # type: ignore[assignment]
        took[name] = seconds(model, ids, arguments.repeats)
    linear.is_native = chosen
    took["float32"] = seconds(fewbit.load(arguments.model, dtype=torch.float32, device="cpu"), ids, arguments.repeats)
    base = took["torch's own"]
    for name, value in took.items():
        print(f"{name:12} {value:6.2f} s  {value / base:.2f}")


if __name__ == "__main__":
    main()
