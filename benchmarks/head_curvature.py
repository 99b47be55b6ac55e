"""Embeddings and head chosen by the column solver, under several curvatures, against rounding: what each costs alone.

    python benchmarks/head_curvature.py --bits 4 --bits 6 --bits 8

The layers stay in 16 bits. Curvatures are measured on calibration text (`--text`), the divergence from the original on
other text (`--data`). With a tied head, the table is used on both sides ("both"), or with `--sides` also on that of the
embeddings alone and that of the head alone. Prints rows of a Markdown table. With x the inputs of the head and g the
gradients of the loss at its outputs, of each token: gram is the sum of x x^T, fisher that of |g|^2 x x^T, half an equal
mix of both (the default of `oac`), and expected has 1 - sum p^2, the expectation of |g|^2 over the model's own next
tokens. With "+rows", the sum of d d^T is added, where d are the gradients at the embeddings of a tied table.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.evaluation.perplexity import Protocol, Totals
from fewbit.evaluation.score import window_logits
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.grids.embeddings import embedding_grid
from fewbit.pipeline.calibration_tokens import calibration_set
from fewbit.pipeline.plan import scheme_for
from fewbit.recipe import Recipe
from fewbit.solvers.choice import SolverChoice
from fewbit.solvers.settled import WeightChoices
from fewbit.solvers.weight import solve_weight

SHARED = Path(__file__).parent / "../../shared/data"
ROWS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--bits", type=int, action="append", required=True)
    parser.add_argument("--curvature", action="append", help="default: gram, fisher, half, expected and half+rows")
    parser.add_argument("--damping", type=float, action="append", help="default: 0.01 and 0.1")
    parser.add_argument("--importance", action="append", help="default: none")
    parser.add_argument("--sides", action="store_true")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--text", type=Path, default=SHARED / "c4_rp_sample1.jsonl")
    parser.add_argument("--data", type=Path, default=SHARED / "wikitext2_raw_test.txt")
    arguments = parser.parse_args()
    model = fewbit.load(arguments.model, device="cpu")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = embedding.weight.detach(), head.weight.detach()
    folder = locate(arguments.model)
    choice = CalibrationChoice(str(arguments.text), samples=arguments.samples, sequence_length=512)
    ids = calibration_set(open_checkpoint(folder), choice, model).ids
    started = time.process_time()
    found = measured(model, ids)
    print(f"curvatures: {time.process_time() - started:.0f} s", flush=True)
    windows = read_windows(folder, read_text(arguments.data), Protocol(512, arguments.windows))[0]
    tied = bool(model.config.tie_word_embeddings)
    print("| model | bits | curvature | damping | importance | side | squared error | KL | perplexity | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    originals = [window_logits(model, window) for window in windows]
    for bits in arguments.bits:
        for name, solver in variants(arguments):
            started = time.process_time()
            table = solved(last, None if solver is None else curvature(found, name), bits, solver)
            took = time.process_time() - started
            error = float((table - last.float()).square().sum() / last.float().square().sum())
            low = table.to(last.dtype)
            for side in (
                ("both", "embeddings", "head") if tied and arguments.sides else ("both",) if tied else ("head",)
            ):
                total = Totals()
                put(embedding, head, low if side != "head" else first, low if side != "embeddings" else last)
                for window, expected in zip(windows, originals, strict=True):
                    total.add(window_logits(model, window), window[1:], expected)
                kl = float(torch.cat(total.divergences).double().mean())
                damping, weighed = ("", "") if solver is None else (f"{solver.damping:g}", solver.importance)
                chosen = f"| {arguments.model} | {bits} | {name} | {damping} | {weighed} | {side}"
                perplexity = math.exp(total.nll / total.tokens)
                print(f"{chosen} | {error:.2e} | {kl:.5f} | {perplexity:.3f} | {took:.1f} |", flush=True)


def variants(arguments: argparse.Namespace) -> Iterator[tuple[str, SolverChoice | None]]:
    yield "none (rounded)", None
    for name in arguments.curvature or ["gram", "fisher", "half", "expected", "half+rows"]:
        for damping in arguments.damping or [0.01, 0.1]:
            for importance in arguments.importance or ["none"]:
                yield name, SolverChoice("column", damping=damping, act_order=True, importance=importance)


def put(embedding: Any, head: Any, first: Tensor, last: Tensor) -> None:
    embedding.weight = torch.nn.Parameter(first, requires_grad=False)
    head.weight = torch.nn.Parameter(last, requires_grad=False)


def measured(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The sums `(in, in)`: gram, fisher, expected and rows."""
    model.requires_grad_(False)
    sums: dict[str, Tensor] = {}
    inputs: list[Tensor] = []
    entering: list[Tensor] = []

    def enter(module: Any, args: Any, out: Tensor) -> Tensor:
        entering.append(out.requires_grad_(True))
        return out

    handles = [
        model.get_output_embeddings().register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
        model.get_input_embeddings().register_forward_hook(enter),
    ]
    for sequence in ids:
        inputs.clear()
        entering.clear()
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, :-1]
        log = torch.log_softmax(logits.detach().float(), dim=-1)
        gradient = log.exp()
        expected = 1 - gradient.square().sum(dim=1)
        gradient[torch.arange(len(gradient)), sequence[1:]] -= 1
        squares = gradient.square().sum(dim=1)
        logits.backward(gradient.to(logits.dtype))
        came = entering[0].grad
        assert came is not None
        x, rows = inputs[0][0, :-1].detach().float(), came[0].float()
        for name, weights in (("gram", torch.ones_like(squares)), ("fisher", squares), ("expected", expected)):
            sums[name] = sums.get(name, 0) + (x.t() @ (x * weights.unsqueeze(1))).double()
        sums["rows"] = sums.get("rows", 0) + (rows.t() @ rows).double()
    for handle in handles:
        handle.remove()
    return sums


def curvature(found: dict[str, Tensor], name: str) -> Tensor:
    kind, _, rows = name.partition("+")
    matrix = found["fisher" if kind == "half" else kind]
    if kind == "half":
        matrix = matrix + found["gram"] * (matrix.trace() / found["gram"].trace())
    return matrix + found[rows] if rows else matrix


def solved(weight: Tensor, matrix: Tensor | None, bits: int, solver: SolverChoice | None) -> Tensor:
    """The decoded table on the grid of embeddings."""
    grid, scales = embedding_grid(bits, weight.shape[1])
    recipe = Recipe("embeddings", grid=grid, scales=scales)
    choices = WeightChoices(scheme_for(weight.shape[1], recipe), grid.search, solver=solver or SolverChoice())
    return torch.cat([solve_weight(rows, matrix, choices).decoded for rows in weight.split(ROWS)])


if __name__ == "__main__":
    main()
