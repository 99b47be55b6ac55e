"""Which choices of a calibrated method earn their place: one choice at a time is changed from `precal+oac` on a Fisher.

    python benchmarks/calibrated_choices.py --folder /somewhere/with/space --model smollm2-135m --bits 2 --bits 3

Calibration and perplexity as in calibrated_quality.py, whose folder and curvatures it shares. Which curvature a row is
solved on is one of the table CURVATURES: its own measurement, or the mean of a Fisher and a Gram after dividing each
matrix by its mean diagonal. `refresh` rows measure the Fisher in the run, 10 or 3 blocks at a time. Rows that stand in
`results/calibrated_choices.json` are not measured again.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibrated_quality import C4, GROUP, TEXT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbit
from fewbit.calibration.choice import CalibrationChoice
from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import open_checkpoint
from fewbit.curvature.choice import BEST_GRAM_SHARE, CurvatureChoice
from fewbit.curvature.store import open_curvature
from fewbit.evaluation.perplexity import Protocol
from fewbit.grids.grid import ScaleSearch
from fewbit.memory import keep_freed_memory
from fewbit.pipeline.calibration_options import CalibrationOptions
from fewbit.pipeline.measure_curvature import measure
from fewbit.pipeline.run import RunOptions
from fewbit.recipe import Recipe, replace_solver

HERE = Path(__file__).parent
EVEN = {"grid": "zero-point", "scale_format": "float16"}
NO_OUTLIERS = {"outliers": "none"}

TOKEN = CurvatureChoice("fisher", terms="token")
CURVATURES: dict[str, tuple[CurvatureChoice, int, int]] = {
    "fisher": (TOKEN, 128, 512),
    "fisher-mixed": (replace(TOKEN, gram_share=BEST_GRAM_SHARE), 128, 512),
    "fisher-sequence": (CurvatureChoice("fisher", terms="sequence"), 128, 512),
    "fisher-sampled": (replace(TOKEN, labels="sampled"), 128, 512),
    "fisher-32x512": (TOKEN, 32, 512),
    "fisher-512x128": (TOKEN, 512, 128),
    "fisher-32x2048": (TOKEN, 32, 2048),
    "gram": (CurvatureChoice("gram"), 128, 512),
}
MEAN = "fisher and gram"
REFRESH = {"refresh 10": 10, "refresh 3": 3}

VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Fisher alone": ("fisher", {}, {}),
    "Gram share 0.5, one pass": ("fisher-mixed", {}, {}),
    "Fisher of whole sequences": ("fisher-sequence", {}, {}),
    "labels sampled from the model": ("fisher-sampled", {}, {}),
    "32 sequences of 512": ("fisher-32x512", {}, {}),
    "512 sequences of 128": ("fisher-512x128", {}, {}),
    "32 sequences of 2048": ("fisher-32x2048", {}, {}),
    "mean of Fisher and Gram": (MEAN, {}, {}),
    "input Gram": ("gram", {}, {}),
    "measured again every 10 blocks": ("refresh 10", {}, {}),
    "measured again every 3 blocks": ("refresh 3", {}, {}),
    "no curvature (rounding)": ("", {}, {}),
    "damping 0.001": ("fisher", {}, {"damping": 0.001}),
    "damping 0.01": ("fisher", {}, {"damping": 0.01}),
    "damping 1": ("fisher", {}, {"damping": 1.0}),
    "damping 10": ("fisher", {}, {"damping": 10.0}),
    "no act-order": ("fisher", {}, {"act_order": False}),
    "importance diagonal": ("fisher", {}, {"importance": "diagonal"}),
    "importance none": ("fisher", {}, {"importance": "none"}),
    "one outlier in 64": ("fisher", {"outlier_fraction": 1 / 64}, {}),
    "no outliers": ("fisher", NO_OUTLIERS, {}),
    "no outliers, evenly spaced": ("fisher", {**NO_OUTLIERS, **EVEN}, {}),
    "no outliers, evenly spaced, min-max": ("fisher", {**NO_OUTLIERS, **EVEN, "search": None}, {}),
    "search power 2.5": ("fisher", {"search": ScaleSearch(error_power=2.5)}, {}),
    "search from 0.3": ("fisher", {"search": ScaleSearch(smallest=0.3)}, {}),
}


def recipe_of(label: str, bits: int, group_size: str) -> Recipe:
    """The recipe of a row."""
    kind, changes, solver = VARIANTS[label]
    recipe = fewbit.preset("precal+oac", bits=bits, group_size=f"{group_size},auto", embedding_bits=16, **changes)
    if not kind:
        return replace(recipe, curvature=None, solver=replace(recipe.solver, kind="round"))
    choice = CURVATURES[kind][0] if kind in CURVATURES else TOKEN
    return replace_solver(replace(recipe, curvature=choice), **solver)


def curvature(model: str, kind: str, folder: Path, seed: int) -> Path:
    """The folder of a curvature, measured if it is not there."""
    out = folder / f"{model}-{kind.replace(' ', '-')}-{seed}"
    if out.with_suffix(".json").exists():
        return out
    if kind == MEAN:
        figures: dict[str, Any] = {}
        mix(curvature(model, "fisher", folder, seed), curvature(model, "gram", folder, seed), out)
    else:
        choice, samples, length = CURVATURES[kind]
        options = CalibrationOptions(CalibrationChoice(str(C4.resolve()), samples, length, seed))
        figures = measure(model, out, choice, options)
    out.with_suffix(".json").write_text(json.dumps(figures))
    return out


def mix(fisher: Path, gram: Path, out: Path) -> None:
    """The mean of two stored curvatures after dividing each matrix by its mean diagonal, kept as a Fisher."""
    shutil.copytree(fisher, out)
    for path in out.glob("block-*.safetensors"):
        with safe_open(gram / path.name, framework="pt") as file:
            owners = json.loads(file.metadata()["shared"])
        grams = load_file(gram / path.name)
        mixed = {n: unit(m) + unit(grams[owners.get(n, n)]) for n, m in load_file(path).items()}
        save_file(mixed, path, {"shared": "{}"})


def unit(matrix: Tensor) -> Tensor:
    """A matrix with a mean diagonal of 1."""
    return matrix / matrix.diagonal().mean()


def calibration_of(model: str, kind: str, folder: Path, seed: int) -> CalibrationOptions:
    """What a row calibrates on: a stored curvature, or one that is measured in the run."""
    if kind in REFRESH:
        return CalibrationOptions(CalibrationChoice(str(C4.resolve()), 128, 512, seed), refresh=REFRESH[kind])
    return CalibrationOptions(
        stored=open_curvature(curvature(model, kind, folder, seed), open_checkpoint(locate(model)))
    )


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, choices=GROUP)
    parser.add_argument("--bits", type=int, action="append", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "calibrated_choices.json")
    arguments = parser.parse_args()
    keep_freed_memory()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    done = {(row["model"], row["bits"], row["variant"], row["seed"]) for row in rows}
    for model in arguments.model:
        for bits in arguments.bits:
            for label in arguments.variant or VARIANTS:
                if (model, bits, label, arguments.seed) in done:
                    continue
                recipe = recipe_of(label, bits, GROUP[model])
                options = RunOptions(overwrite=True)
                if recipe.curvature is not None:
                    calibration = calibration_of(model, VARIANTS[label][0], arguments.folder, arguments.seed)
                    options = replace(options, calibration=calibration)
                out = arguments.folder / f"out-choices-{model}"
                report = fewbit.quantize(model, out, recipe, options)
                found = fewbit.evaluate(out, TEXT, Protocol(1024, 24))["models"][0]
                shutil.rmtree(out)
                row = {
                    "model": model,
                    "bits": bits,
                    "variant": label,
                    "seed": arguments.seed,
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
