"""Passes of 16-bit weights: torch's own products, widened ones, and the model in float32; medians, in one run.

    python benchmarks/products.py --model smollm2-135m

Forward, and forward and back to the inputs of the first block. Tells what `fewbit.linear` and `fewbit.attention` are
worth on this processor. On one with bfloat16 products of its own nothing is widened.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fewbit
from fewbit import attention, linear
from fewbit.architecture.network import find_blocks


def median(call: Callable[[], Any], repeats: int) -> float:
    """Seconds, median over repeats after one that is not counted."""
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def measure(model: Any, ids: torch.Tensor, repeats: int) -> tuple[float, float, torch.Tensor]:
    """Seconds forward, seconds forward and back, and log-probabilities `(tokens, vocabulary)`."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(ids)
    log_probabilities = torch.empty(0)

    def forward() -> None:
        nonlocal log_probabilities
        with torch.inference_mode():
            log_probabilities = model(ids, use_cache=False).logits[0].float().log_softmax(-1)

    def there_and_back() -> None:
        with attention.fast_attention(find_blocks(model)):
            model(inputs_embeds=embedded.clone().requires_grad_(), labels=ids, use_cache=False).loss.backward()

    return median(forward, repeats), median(there_and_back, repeats), log_probabilities


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
        for module in (linear, attention):
            module.is_native = lambda dtype, native=native: native  # type: ignore[attr-defined]
        took[name] = measure(model, ids, arguments.repeats)
    for module in (linear, attention):
        module.is_native = chosen  # type: ignore[attr-defined]
    took["float32"] = measure(fewbit.load(arguments.model, dtype=torch.float32, device="cpu"), ids, arguments.repeats)
    forward, both, _ = took["torch's own"]
    exact = took["float32"][2]
    print("               forward        and back")
    for name, (there, back, found) in took.items():
        far = float(torch.nn.functional.kl_div(found, exact, log_target=True, reduction="none").sum(-1).mean())
        figures = f"{there:6.2f} s {there / forward:.2f}  {back:6.2f} s {back / both:.2f}"
        print(f"{name:12} {figures}  {far:.5f} nats a token from float32", flush=True)


if __name__ == "__main__":
    main()
