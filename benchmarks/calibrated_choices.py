"""Which choices of a calibrated method earn their place: one choice at a time is changed from `precal+oac`.

    python benchmarks/calibrated_choices.py --folder /somewhere/with/space --model smollm2-135m --bits 2 --bits 3

Curvatures, calibration and perplexity as in calibrated_quality.py, whose folder and curvatures it shares. Rows that
stand in `results/calibrated_choices.json` are not measured again.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibrated_quality import C4, GROUP, TEXT

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.curvature.choice import CurvatureChoice
from fewbit.curvature.store import open_curvature
from fewbit.evaluation.perplexity import Protocol
from fewbit.grids.codebook import ScaleSearch
from fewbit.memory import keep_freed_memory
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.measure import measure
from fewbit.pipeline.run import RunOptions
from fewbit.recipe import Recipe, replace_solver

HERE = Path(__file__).parent
EVEN = {"grid": "zero-point", "scale_format": "float16"}
NO_OUTLIERS = {"outliers": "none"}

VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "precal+oac": ("fisher-token", {}, {}),
    "Fisher of whole sequences": ("fisher-sequence", {}, {}),
    "input Gram": ("gram", {}, {}),
    "no curvature (rounding)": ("", {}, {}),
    "damping 0.01": ("fisher-token", {}, {"damping": 0.01}),
    "damping 1": ("fisher-token", {}, {"damping": 1.0}),
    "no act-order": ("fisher-token", {}, {"act_order": False}),
    "importance diagonal": ("fisher-token", {}, {"importance": "diagonal"}),
    "importance none": ("fisher-token", {}, {"importance": "none"}),
    "one outlier in 64": ("fisher-token", {"outlier_fraction": 1 / 64}, {}),
    "no outliers": ("fisher-token", NO_OUTLIERS, {}),
    "no outliers, evenly spaced": ("fisher-token", {**NO_OUTLIERS, **EVEN}, {}),
    "no outliers, evenly spaced, min-max": ("fisher-token", {**NO_OUTLIERS, **EVEN, "search": None}, {}),
    "search power 2.5": ("fisher-token", {"search": ScaleSearch(error_power=2.5)}, {}),
    "search from 0.3": ("fisher-token", {"search": ScaleSearch(smallest=0.3)}, {}),
}


def recipe_of(label: str, bits: int, group_size: str) -> Recipe:
    """The recipe of a row."""
    kind, changes, solver = VARIANTS[label]
    recipe = fewbit.preset("precal+oac", bits=bits, group_size=f"{group_size},auto", **changes)
    if not kind:
        return replace(recipe, curvature=None, solver=replace(recipe.solver, kind="round"))
    name, _, terms = kind.partition("-")
    return replace_solver(replace(recipe, curvature=CurvatureChoice(name, terms=terms or "token")), **solver)


def curvature(model: str, choice: CurvatureChoice, folder: Path) -> Path:
    """The folder of a curvature, measured if it is not there."""
    suffix = "-sequence" if choice.kind == "fisher" and choice.terms == "sequence" else ""
    out = folder / f"{model}-{choice.kind}{suffix}-0"
    if not (out.with_suffix(".json").exists()):
        options = CalibrationOptions(CalibrationChoice(str(C4.resolve()), 128, 512, 0))
        out.with_suffix(".json").write_text(json.dumps(measure(model, out, choice, options)))
    return out


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, choices=GROUP)
    parser.add_argument("--bits", type=int, action="append", required=True)
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "calibrated_choices.json")
    arguments = parser.parse_args()
    keep_freed_memory()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    done = {(row["model"], row["bits"], row["variant"]) for row in rows}
    for model in arguments.model:
        for bits in arguments.bits:
            for label in arguments.variant or VARIANTS:
                if (model, bits, label) in done:
                    continue
                recipe = recipe_of(label, bits, GROUP[model])
                options = RunOptions(overwrite=True)
                if recipe.curvature is not None:
                    kept = curvature(model, recipe.curvature, arguments.folder)
                    stored = open_curvature(kept, open_checkpoint(locate(model)))
                    options = replace(options, calibration=CalibrationOptions(stored=stored))
                out = arguments.folder / "out-choices"
                report = fewbit.quantize(model, out, recipe, options)
                found = fewbit.evaluate(out, TEXT, Protocol(1024, 24))["models"][0]
                shutil.rmtree(out)
                row = {
                    "model": model,
                    "bits": bits,
                    "variant": label,
                    "bits_per_weight": report["output"]["bits_per_weight"],
                    "perplexity": found["perplexity"],
                    "seconds": report["run"]["seconds"],
                    "recipe": recipe.to_dict(),
                }
                rows.append(row)
                print(f"{model} {bits} {row['bits_per_weight']:.3f} {row['perplexity']:10.2f} {label}", flush=True)
                arguments.results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
