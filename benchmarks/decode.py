"""Tokens per second and memory: one token at a time with a cache, and 512 at once, packed against transformers.

    python benchmarks/decode.py --folder /somewhere/with/space --model smollm2-135m

Each row is measured in processes of its own, in turns, on one thread. Times are of the processor, not of the clock: for
one thread that is the same on an idle machine, and other work disturbs it less. Memory is that of the operating system
above what the process had before it loaded the model; before that, it ran a tiny model of the same kind, so that the
code of the libraries is not counted. Embeddings and head have the bits that `fewbit quantize` gives them, and 16 in one
more row for each `--kept-embeddings BITS`. `--other NAME=COMMAND` adds a row from a command that prints such a row as
JSON (`decode_seconds`, `prefill_seconds`, `bytes`); for llama.cpp on the same model that is

    --other "llama.cpp, q4_0=VENV/bin/python benchmarks/llama_cpp_runner.py MODEL.gguf --speed"

where VENV has the wheel `xllamacpp` and NumPy.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPT, PREFILL, STEPS = 16, 512, 24
MEGABYTE = 1_000_000


def memory(field: str) -> float:
    """A field of Linux' /proc/self/status in megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / MEGABYTE
    raise SystemExit(f"this system does not tell {field}")


def tiny(folder: Path, bits: int) -> None:
    """Run a tiny model, and the same quantized, so that all code is loaded and compiled."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import fewbit

    sizes = {"hidden_size": 576, "intermediate_size": 576, "num_hidden_layers": 1, "num_attention_heads": 9}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).bfloat16().save_pretrained(folder / "plain")
    models = [fewbit.load(folder / "plain", device="cpu")]
    if bits < 16:
        fewbit.quantize(folder / "plain", folder / "packed", fewbit.preset("adpq+", bits=bits))
        models.append(fewbit.load(folder / "packed", device="cpu"))
    for model in models:
        with torch.inference_mode():
            for tokens in (1, 32):
                model(torch.zeros(1, tokens, dtype=torch.int64))


def measure(model: str, dtype: str, bits: int) -> dict[str, Any]:
    """One row: seconds of the processor for a token and for a prompt, and megabytes."""
    import torch

    import fewbit

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tiny(Path(folder), bits)
    # The highest memory so far is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    loaded = fewbit.load(model, dtype=getattr(torch, dtype), device="cpu")
    ids = torch.randint(100, 40_000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    decode, prefill = [], []
    with torch.inference_mode():
        out = loaded(ids[:, :PROMPT], use_cache=True)
        for _ in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            started = time.process_time()
            out = loaded(token, past_key_values=out.past_key_values, use_cache=True)
            decode.append(time.process_time() - started)
        held, peak = memory("VmRSS") - before, memory("VmHWM") - before
        for _ in range(2):
            started = time.process_time()
            loaded(ids, use_cache=True, logits_to_keep=1)
            prefill.append(time.process_time() - started)
    return {
        "decode_seconds": statistics.median(decode[4:]),
        "prefill_seconds": min(prefill),
        "held_megabytes": held,
        "peak_megabytes": peak,
    }


def folder_of(model: str, bits: int, embeddings: int | None, top: Path) -> Path:
    """The model quantized with `adpq+`, made if it is not there. embeddings: their bits and the head's."""
    import fewbit

    out = top / (f"{model}-{bits}" if embeddings is None else f"{model}-{bits}-{embeddings}")
    if not out.exists():
        kept = {} if embeddings is None else {"embedding_bits": embeddings}
        fewbit.quantize(model, out, fewbit.preset("adpq+", bits=bits, **kept))
    return out


def run_row(words: list[str]) -> dict[str, Any]:
    """What a command prints in its last line."""
    printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return found


def main() -> None:
    """Measure all rows in turns, print them, and keep them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--bits", type=int, action="append")
    parser.add_argument("--kept-embeddings", type=int, action="append", default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--other", action="append", default=[])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "decode.json")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        model, dtype, bits = arguments.row
        print(json.dumps(measure(model, dtype, int(bits))))
        return
    if arguments.folder is None:
        parser.error("--folder is needed, for the quantized models")
    own = [sys.executable, str(Path(__file__)), "--row"]
    rows = {f"transformers, {dtype}": [*own, arguments.model, dtype, "16"] for dtype in ("bfloat16", "float32")}
    sizes = {}
    packed: list[tuple[int, int | None]] = [(bits, None) for bits in arguments.bits or (8, 4, 3, 2)]
    for bits, embeddings in packed + [(bits, 16) for bits in arguments.kept_embeddings]:
        made = folder_of(arguments.model, bits, embeddings, arguments.folder)
        name = f"packed, {bits} bits" + (", embeddings and head 16" if embeddings else "")
        rows[name] = [*own, str(made), "bfloat16", str(bits)]
        sizes[name] = sum(file.stat().st_size for file in made.glob("*.safetensors"))
    rows |= {name: shlex.split(command) for name, _, command in (one.partition("=") for one in arguments.other)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for _ in range(arguments.repeats):
        for name, words in rows.items():
            found[name].append(run_row(words))
            print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    table = [
        {
            "model": arguments.model,
            "row": name,
            **{key: statistics.median(one[key] for one in several) for key in several[0]},
            "decode_tokens_per_second": 1 / statistics.median(one["decode_seconds"] for one in several),
            "prefill_tokens_per_second": PREFILL / statistics.median(one["prefill_seconds"] for one in several),
            **({"bytes": sizes[name]} if name in sizes else {}),
        }
        for name, several in found.items()
    ]
    kept = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    kept = [row for row in kept if row["model"] != arguments.model] + table
    arguments.results.write_text(json.dumps(kept, indent=1) + "\n")
    fastest = max(row["decode_tokens_per_second"] for row in table if row["row"].startswith("transformers"))
    print("| | tokens a second, one at a time | | tokens a second, 512 at once | memory, MB | at most, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in table:
        one = row["decode_tokens_per_second"]
        print(
            f"| {row['row']} | {one:.1f} | {one / fastest:.2f} x | {row['prefill_tokens_per_second']:.0f} "
            f"| {row.get('held_megabytes', float('nan')):.0f} | {row.get('peak_megabytes', float('nan')):.0f} |"
        )


if __name__ == "__main__":
    main()
