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


def measure(model: torch.nn.Module, ids: torch.Tensor, repeats: int) -> tuple[float, torch.Tensor]:
    """Seconds, median over repeats after one that is not counted, and log-probabilities `(tokens, vocabulary)`."""
    found = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            logits = model(ids, use_cache=False).logits[0]
            found.append(time.perf_counter() - started)
    return statistics.median(found[1:]), logits.float().log_softmax(-1)


def main() -> None:
    """Print the three: seconds, ratios to torch's own, distance from float32."""
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
        took[name] = measure(model, ids, arguments.repeats)
    linear.is_native = chosen
    took["float32"] = measure(fewbit.load(arguments.model, dtype=torch.float32, device="cpu"), ids, arguments.repeats)
    base, exact = took["torch's own"][0], took["float32"][1]
    for name, (value, found) in took.items():
        far = float(torch.nn.functional.kl_div(found, exact, log_target=True, reduction="none").sum(-1).mean())
        print(f"{name:12} {value:6.2f} s  {value / base:.2f}  {far:.5f} nats a token from float32")


if __name__ == "__main__":
    main()
