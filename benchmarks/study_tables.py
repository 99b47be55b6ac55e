"""Markdown tables of finished studies, for docs/studies, from their study.json as kept in results/studies.

    python benchmarks/study_tables.py --keep smol-sets/study.json smollm2-135m-calibration-sets
    python benchmarks/study_tables.py benchmarks/results/studies/smollm2-135m-calibration-sets.json

For calibration-sets: the ratio of perplexities to the default set with the interval and verdict of the equivalence
test, how much the seed alone changes it, and accuracies. Other studies print their conclusion.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

KEPT = Path(__file__).parent / "results" / "studies"


def calibration_sets(study: dict[str, Any]) -> None:
    """One row a set, one column a method."""
    found = study["findings"]
    methods = [(row["method"], row["bits"]) for row in found["seeds"]]
    cell = {(row["set"], row["method"], row["bits"]): row for row in found["sets"]}
    axes = {row["set"]: row["axis"] for row in found["sets"]}
    print("| set | " + " | ".join(f"{method}, {bits} bits" for method, bits in methods) + " |")
    print("| --- |" + " --- |" * len(methods))
    for name, axis in axes.items():
        shown = []
        for method, bits in methods:
            row = cell.get((name, method, bits))
            interval = f"({row['low']:.2f} to {row['high']:.2f})" if row and "low" in row else ""
            shown.append(f"{row['ratio']:.3f} {interval} {row['verdict']}" if row else "")
        print(f"| {axis}: {name} | " + " | ".join(shown) + " |")
    deviations = [row.get("pooled_deviation") for row in found["seeds"]]
    print("| change from the seed alone | " + " | ".join("" if d is None else f"{d:.1%}" for d in deviations) + " |")
    print("| perplexity, default set | " + " | ".join(f"{row['perplexity']:.1f}" for row in found["seeds"]) + " |")
    tasks = [row for row in study["rows"] if row["table"] == "task"]
    if tasks:
        accuracies(tasks, methods)


def accuracies(tasks: list[dict[str, Any]], methods: list[tuple[str, int]]) -> None:
    """Mean accuracy over the tasks and seeds of each set."""
    names = list(dict.fromkeys(row["task"] for row in tasks))
    original = [row["accuracy"] for row in tasks if "set" not in row]
    print(f"\nMean accuracy on {', '.join(names)}; the original: {mean(original):.1%}.\n")
    print("| set | " + " | ".join(f"{method}, {bits} bits" for method, bits in methods) + " |")
    print("| --- |" + " --- |" * len(methods))
    for name in dict.fromkeys(row["set"] for row in tasks if "set" in row):
        shown = []
        for method, bits in methods:
            own = [r["accuracy"] for r in tasks if (r.get("set"), r["method"], r["bits"]) == (name, method, bits)]
            shown.append(f"{mean(own):.1%}" if own else "")
        print(f"| {name} | " + " | ".join(shown) + " |")


def keep(study: Path, name: str) -> None:
    """Copy a finished study into results/studies, with file names in place of paths."""
    text = re.sub(r'"/[^"]*/([^"/]+)"', r'"\1"', study.read_text(encoding="utf-8"))
    kept = json.loads(text)
    KEPT.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(row) for row in kept.pop("rows"))
    rest = json.dumps(kept, indent=1).removesuffix("\n}")
    (KEPT / f"{name}.json").write_text(f'{rest},\n "rows": [\n{rows}\n]}}\n', encoding="utf-8")


def main() -> None:
    """Print the tables of the named files, or keep one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--keep", nargs=2, metavar=("STUDY", "NAME"), help="Copy a study.json to results/studies.")
    arguments = parser.parse_args()
    if arguments.keep:
        keep(Path(arguments.keep[0]), arguments.keep[1])
    for path in arguments.files:
        study = json.loads(path.read_text(encoding="utf-8"))
        print(f"\n{path.stem}: {study['choice'].get('model', '')}\n")
        if "sets" in study["findings"] and "seeds" in study["findings"]:
            calibration_sets(study)
            print()
        print(*study["conclusion"], sep="\n")


if __name__ == "__main__":
    main()
