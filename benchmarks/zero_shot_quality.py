"""Which zero-shot choices earn their bytes: perplexity of many recipes on both named models, one JSON of results.

    python benchmarks/zero_shot_quality.py --model smollm2-135m --model gemma3-270m --bits 3 --bits 4

Protocol: WikiText-2 raw test, 24 windows of 1,024 tokens, bfloat16, BOS as the tokenizer does. Results that the
output file already has are not computed again, so an interrupted run goes on.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import fewbit
from fewbit.evaluation.perplexity import Protocol
from fewbit.recipe_choices import recipe_from_choices

HERE = Path(__file__).parent
TEXT = HERE / "../../shared/data/wikitext2_raw_test.txt"

ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("rtn, groups of 64", "rtn", {"group_size": "64"}),
    ("rtn, groups of 32", "rtn", {"group_size": "32"}),
    ("adpq as published", "adpq", {}),
    ("adpq+", "adpq+", {}),
    ("adpq+, error power 2", "adpq+", {"error_power": 2.0}),
    ("adpq+, error power 3", "adpq+", {"error_power": 3.0}),
    ("adpq+, norm-gain column weights", "adpq+", {"column_weights": "norm-gain"}),
    ("adpq+, evenly spaced levels (zero-point grid)", "adpq+", {"grid": "zero-point"}),
    ("adpq+, one outlier a group", "adpq+", {"outlier_fraction": 1 / 64}),
    ("adpq+, no outliers, groups of 32", "adpq+", {"outlier_fraction": 0.0, "group_size": "32"}),
    ("adpq+, min-max range", "adpq+", {"clip_search": False}),
    ("adpq, 0 on the grid (zero-point grid)", "adpq", {"grid": "zero-point"}),
    ("adpq, group scope", "adpq", {"outlier_scope": "group"}),
    ("adpq, sign-magnitude outliers", "adpq", {"outlier_grid": "sign-magnitude"}),
    ("adpq, clip search on the core", "adpq", {"clip_search": True}),
    (
        "adpq, zero-point, group scope, sign-magnitude, clip search",
        "adpq",
        {
            "grid": "zero-point",
            "outlier_scope": "group",
            "outlier_grid": "sign-magnitude",
            "clip_search": True,
            "group_size": "64",
            "outlier_fraction": 1 / 32,
        },
    ),
    ("rtn, groups of 32, clip search", "rtn", {"group_size": "32", "clip_search": True}),
    ("rtn, groups of 16", "rtn", {"group_size": "16"}),
]


def main() -> None:
    """Run what is missing and rewrite the results after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--bits", action="append", type=int, required=True)
    parser.add_argument("--only", help="rows whose name begins with this")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "zero_shot_quality.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    done = {(r["model"], r["row"], r["bits"]) for r in results}
    protocol = Protocol(1024, arguments.windows)
    for model in arguments.model:
        for bits in arguments.bits:
            for row, method, choices in ROWS:
                if (model, row, bits) in done or (arguments.only and not row.startswith(arguments.only)):
                    continue
                with tempfile.TemporaryDirectory() as scratch:
                    out = Path(scratch) / "out"
                    report = fewbit.quantize(
                        model, out, recipe_from_choices(method, {"embedding_bits": 16, **choices, "bits": bits})
                    )
                    measured = fewbit.evaluate(out, TEXT, protocol)["models"][0]
                results.append(
                    {
                        "model": model,
                        "row": row,
                        "bits": bits,
                        "bits_per_weight": measured["bits_per_weight"],
                        "perplexity": measured["perplexity"],
                        "seconds": report["run"]["seconds"],
                        "recipe": report["recipe"],
                    }
                )
                print(
                    model,
                    bits,
                    f"{measured['bits_per_weight']:.3f} {measured['perplexity']:.2f}",
                    row,
                    flush=True,
                )
                arguments.results.parent.mkdir(exist_ok=True)
                arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
