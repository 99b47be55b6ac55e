"""Tokens per second and memory on a GPU: one token at a time and 512 at once, packed against bfloat16; in one run.

    python benchmarks/decode_cuda.py --synthetic 8,4096,14336
    python benchmarks/decode_cuda.py --model MODEL --folder /somewhere/with/space
    python benchmarks/decode_cuda.py --products

`--synthetic LAYERS,HIDDEN,FFN` needs no file: a Llama with random weights, in which layers of one shape share the
values, not the memory, of their packed weights. Otherwise the model is quantized with `adpq+` into the folder.
Each row is run step by step, as a CUDA graph, and compiled (`torch.compile(model, mode="reduce-overhead")`): step by
step, Python's time for each operation is most of it.
Memory is what torch has allocated above what it had before the model. `--products` measures single products with
several tiles instead (`fewbit/runtime/kernels/triton_products.py`), each with enough copies not to fit the cache.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import fewbit
from fewbit.formats.native import GUARD, part_layout
from fewbit.grids import positions
from fewbit.grids.embeddings import default_bits, embedding_grid
from fewbit.grids.scheme import StoredWeight
from fewbit.outliers.grids import pack_outliers
from fewbit.recipe import Recipe
from fewbit.runtime.kernels.cuda import TRITON
from fewbit.runtime.packed_linear import GUARD_BUFFER, PackedLinear, buffer_name
from fewbit.runtime.packed_parameter import PackedParameter, PackedWeight, hold
from fewbit.solvers.settled import WeightChoices, round_rows

HERE = Path(__file__).parent
PROMPT, PREFILL, STEPS, LENGTH = 16, 512, 16, 1024
DTYPE = torch.bfloat16
ROWS_AT_ONCE = 4096
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TILES = ((16, 64, 4), (8, 64, 4), (16, 32, 2), (16, 128, 4), (32, 64, 4), (16, 128, 8), (8, 128, 4), (4, 128, 4))

Packed = tuple[dict[str, Tensor], StoredWeight]


def packed_weight(rows: int, columns: int, choices: WeightChoices, device: torch.device) -> Packed:
    """The parts of a random matrix."""
    generator = torch.Generator(device).manual_seed(0)
    scheme, found = choices.scheme, []
    for first in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - first)
        weight = torch.randn(count, columns, generator=generator, device=device) * 0.02
        found.append(round_rows(weight, choices, None, None))
    parts = {name: torch.cat([one.parts[name] for one in found]) for name in found[0].parts}
    places = [one.where + index * ROWS_AT_ONCE * columns for index, one in enumerate(found) if one.where is not None]
    if not places:
        return parts, StoredWeight(scheme, (rows, columns))
    where = torch.cat(places)
    encoding = positions.choose(positions.Where(rows * columns, len(where), scheme.group_size), None)
    stored = StoredWeight(scheme, (rows, columns), len(where), encoding)
    codes = torch.cat([one.outlier_codes for one in found if one.outlier_codes is not None])
    parts |= pack_outliers(codes, where, stored)
    return {name: parts[name] for name in part_layout(stored)}, stored


def fill(module: nn.Module, packed: Packed) -> None:
    """Give a module copies of the parts of a weight."""
    for name, part in packed[0].items():
        setattr(module, buffer_name(name), part.clone())
    setattr(module, GUARD_BUFFER, torch.empty(GUARD[1], dtype=GUARD[0], device=next(iter(packed[0].values())).device))


def layer_choices(bits: int) -> WeightChoices:
    """As `adpq+` stores a layer."""
    recipe: Recipe = fewbit.preset("adpq+", bits=bits)
    return recipe.for_weight(recipe.scheme(64))


def table_choices(bits: int, columns: int) -> WeightChoices:
    """As embeddings and heads are stored beside layers of so many bits."""
    grid, scales = embedding_grid(default_bits(bits), columns)
    recipe = fewbit.preset("rtn", bits=default_bits(bits), grid=grid.grid.choice, scale_format=scales.format)
    return recipe.for_weight(recipe.scheme(64))


def synthetic(sizes: str, vocabulary: int, device: torch.device) -> Any:
    """A Llama of these sizes with random weights in bfloat16."""
    layers, hidden, ffn = map(int, sizes.split(","))
    heads = max(1, hidden // 128)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def linear_layers(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and module of every linear layer in blocks."""
    for parent in list(model.model.layers.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is nn.Linear:
                yield parent, name, module


def pack_model(model: Any, bits: int, device: torch.device) -> Any:
    """Replace the weights of a synthetic model by packed ones, in place."""
    known: dict[tuple[int, int], Packed] = {}
    for parent, name, module in linear_layers(model):
        shape = (module.out_features, module.in_features)
        if shape not in known:
            known[shape] = packed_weight(*shape, layer_choices(bits), device)
        layer = PackedLinear(known[shape][1], False, DTYPE, device)
        fill(layer, known[shape])
        setattr(parent, name, layer)
    for module in (model.model.embed_tokens, model.lm_head):
        rows, columns = module.weight.shape
        packed = packed_weight(rows, columns, table_choices(bits, columns), device)
        source = PackedWeight("weight", packed[1])
        fill(source, packed)
        hold(module, "weight", PackedParameter("weight", [source], None, DTYPE))
    return model.to(device)


class Int4(nn.Module):
    """torch's own product with 4-bit weights in groups of 64, with random codes."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        super().__init__()
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
        self.packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        self.scales = torch.full((columns // 64, rows, 2), 0.01, dtype=DTYPE, device=device)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        found = torch.ops.aten._weight_int4pack_mm(flat, self.packed, 64, self.scales)
        return found.view(*x.shape[:-1], self.rows)


def with_int4(model: Any, device: torch.device) -> Any:
    """Replace the layers in blocks by torch's own with 4 bits, in place; embeddings and head stay."""
    for parent, name, module in linear_layers(model):
        setattr(parent, name, Int4(module.out_features, module.in_features, device))
    return model


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Seconds, median over repeats after two that are not counted."""
    found = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:])


def graph_of(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call that has run before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replay(graph: torch.cuda.CUDAGraph, times: int) -> None:
    """Run a graph so many times."""
    for _ in range(times):
        graph.replay()


@torch.inference_mode()
def measure_decode(model: Any, ids: Tensor, before: int, repeats: int) -> dict[str, Any]:
    """Seconds for a token: step by step, as a graph, compiled; megabytes."""
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    token = ids[:, :1].clone()
    model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)

    def step() -> Any:
        return model(token, past_key_values=cache, use_cache=True).logits

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {"decode_seconds": seconds(lambda: [step() for _ in range(STEPS)], repeats) / STEPS}
    row["decode_peak_megabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    row["held_megabytes"] = (torch.cuda.memory_allocated() - before) / 1e6
    cache.reset()
    model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
    try:
        graph = graph_of(step)
        row["graph_seconds"] = seconds(partial(replay, graph, STEPS), repeats) / STEPS
    except RuntimeError as error:
        print(f"no graph: {str(error).splitlines()[0]}", file=sys.stderr)
        row["graph_seconds"] = None
    torch.compiler.reset()
    compiled = torch.compile(model, mode="reduce-overhead")
    cache.reset()
    model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
    wanted = step().clone()
    cache.reset()
    model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
    once = lambda: compiled(token, past_key_values=cache, use_cache=True).logits  # noqa: E731
    found = once().clone()
    row["compiled_difference"] = float((found - wanted).float().norm() / wanted.float().norm())
    row["compiled_seconds"] = seconds(lambda: [once() for _ in range(STEPS)], repeats) / STEPS
    return row


@torch.inference_mode()
def measure(model: Any, before: int, repeats: int) -> dict[str, Any]:
    """One row: seconds for a token, step by step and as a graph, and for a prompt; megabytes."""
    ids = torch.randint(3, model.config.vocab_size, (1, PREFILL), device="cuda")
    row = measure_decode(model, ids, before, repeats)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    row["prefill_seconds"] = seconds(lambda: model(ids, use_cache=False, logits_to_keep=1), repeats)
    row["prefill_peak_megabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return row


def models(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of rows, and what loads their models."""
    bits = arguments.bits or [8, 4, 3, 2]
    if arguments.synthetic:
        made = lambda: synthetic(arguments.synthetic, arguments.vocabulary, device)  # noqa: E731
        yield "transformers, bfloat16", made
        for width in bits:
            yield f"packed, {width} bits", lambda width=width: pack_model(made(), width, device)  # type: ignore[misc]
        yield "torch int4, layers alone", lambda: with_int4(made(), device)
        return
    yield "transformers, bfloat16", lambda: fewbit.load(arguments.model, dtype=DTYPE, device=str(device))
    for width in bits:
        out = arguments.folder / f"{Path(arguments.model).name}-{width}"
        if not out.exists():
            fewbit.quantize(arguments.model, out, fewbit.preset("adpq+", bits=width), device=str(device))
        yield f"packed, {width} bits", lambda out=out: fewbit.load(out, device=str(device))  # type: ignore[misc]


def time_products(bits: list[int], device: torch.device) -> None:
    """Print microseconds of products of one token, in bfloat16 and packed with each tile, as JSON lines."""
    from fewbit.runtime.kernels import triton_products

    for shape in SHAPES:
        x = torch.randn(1, shape[1], dtype=DTYPE, device=device)
        plain = [torch.randn(shape, dtype=DTYPE, device=device) for _ in range(4)]
        report({"shape": shape, "bits": 16}, nn.functional.linear, x, plain)
        for width in bits:
            packed = packed_weight(*shape, layer_choices(width), device)
            forms = copies_of(packed, 8)
            for rows, units, warps in TILES:
                triton_products.ONE_TOKEN = triton_products.Tile(rows, units, 256, warps)
                report({"shape": shape, "bits": width, "tile": (rows, units, warps)}, product, x, forms)
    triton_products.ONE_TOKEN = triton_products.Tile(*TILES[0][:2], 256, TILES[0][2])
    forms = copies_of(packed_weight(4096, 4096, layer_choices(4), device), 8)
    for tokens in (2, 16):
        x = torch.randn(tokens, 4096, dtype=DTYPE, device=device)
        report({"shape": (4096, 4096), "bits": 4, "tokens": tokens}, product, x, forms)


def product(x: Tensor, form: Any) -> Tensor:
    """The packed product without a bias."""
    return TRITON.product(form, x, None)


def copies_of(packed: Packed, count: int) -> list[Any]:
    """Prepared forms of copies of a weight."""
    parts, stored = packed
    copies = [{name: part.clone() for name, part in parts.items()} for _ in range(count)]
    return [TRITON.prepare(copy, stored, DTYPE) for copy in copies]


def report(row: dict[str, Any], call: Callable[[Tensor, Any], Any], x: Tensor, weights: list[Any]) -> None:
    """Print the row with the microseconds of a product, measured as a graph of one product with each weight."""

    def once() -> None:
        for weight in weights:
            call(x, weight)

    once()
    graph = graph_of(once)
    took = seconds(partial(replay, graph, 10), 5) / (10 * len(weights))
    print(json.dumps({**row, "microseconds": round(took * 1e6, 2)}), flush=True)


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows, with ratios to the first one."""
    first = rows[0]
    speeds = ("tokens a second", "as a graph", "compiled", "512 at once")
    heads = ["", *(head for name in speeds for head in (name, "")), "memory, MB", "at most: 1 token", "at most: 512"]
    print(f"| {' | '.join(heads)} |")
    print(f"|{' --- |' * len(heads)}")
    for row in rows:
        cells = [row["row"]]
        for key, tokens in (
            ("decode_seconds", 1),
            ("graph_seconds", 1),
            ("compiled_seconds", 1),
            ("prefill_seconds", PREFILL),
        ):
            known = row[key] is not None
            cells.append(f"{tokens / row[key]:.0f}" if known else "-")
            cells.append(f"{first[key] / row[key]:.2f} x" if known and first[key] is not None else "-")
        cells += [f"{row[f'{key}_megabytes']:.0f}" for key in ("held", "decode_peak", "prefill_peak")]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Measure all rows in turns, print them, and keep them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", metavar="LAYERS,HIDDEN,FFN")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--model")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--bits", type=int, action="append")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "decode_cuda.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this measures a GPU, and torch finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    if arguments.products:
        time_products(arguments.bits or [8, 4, 3, 2], device)
        return
    if not arguments.synthetic and not (arguments.model and arguments.folder):
        parser.error("give --synthetic, or --model and --folder")
    rows = []
    for name, load in models(arguments, device):
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        try:
            model = load()
            gc.collect()
            torch.cuda.empty_cache()
            row = {"row": name, **measure(model, before, arguments.repeats)}
        except (RuntimeError, AttributeError) as error:
            if not name.startswith("torch int4"):
                raise
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        rows.append(row)
        print(f"{name}: {row}, {time.perf_counter() - started:.1f} s in all", file=sys.stderr, flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    table = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": arguments.synthetic or arguments.model,
        "rows": rows,
    }
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps(table, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
