"""The study `landscape`: the loss landscape around a model's weights (arXiv 2410.14570).

Only the linear layers in the blocks are moved, in float32. Distances are relative: the norm of the displacement over
the norm of those weights.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewbit.checkpoints.locate import locate
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.errors import FewbitError
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows
from fewbit.formats.config import describe, recipe_of
from fewbit.pipeline.network import open_original
from fewbit.studies.choice import StudyChoice
from fewbit.studies.directions import KINDS, Direction, norm, plane_of, random_direction
from fewbit.studies.landscape_page import draw
from fewbit.studies.landscape_summary import summarize
from fewbit.studies.moving import Movable, loss
from fewbit.studies.network import check_folders, open_quantized
from fewbit.studies.study import Cell, Progress, Row, Size, Study, Tell
from fewbit.studies.variants import Variant, make_variant, measure_once, variants

STEP = 0.01
"""The relative distance of the second difference at 0: float32 losses differ by 1e-6, which leaves 1 % of it."""

_RADII = (STEP, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
_MARGIN = 0.35
_QUICK = {
    "methods": ("rtn", "adpq+", "precal+oac"),
    "bits": (3,),
    "directions": 2,
    "radii": (STEP, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
    "ray": 8,
    "plane": 9,
}
_STANDARD = {
    "methods": ("rtn", "adpq+", "gptq", "precal+oac"),
    "bits": (4, 3, 2),
    "directions": 5,
    "radii": _RADII,
    "ray": 14,
    "plane": 17,
}
_LARGE = {**_STANDARD, "directions": 20, "ray": 28, "plane": 31}


@dataclass
class Opened:
    """What cells share. moves: the last differences from the original that were read, by name."""

    choice: StudyChoice
    checkpoint: Checkpoint
    movable: Movable
    windows: Tensor
    folders: dict[str, Path]
    moves: dict[str, Direction] = field(default_factory=dict)

    def move_to(self, name: str) -> Direction:
        """From the original to the weights of a folder; FewbitError when more than its linear layers differ."""
        if name not in self.moves:
            folder = self.folders[name]
            quantized = open_quantized(folder, self.checkpoint, self.movable.sites)
            if quantized.changed:
                raise FewbitError(
                    f"{folder}: {quantized.changed[0]} differs from the original: only folders that change nothing but "
                    "the linear layers in the blocks can be part of this study"
                )
            found = {id(site): weight for site, weight in quantized.read(self.movable.sites)}
            while len(self.moves) > 1:
                del self.moves[next(iter(self.moves))]
            self.moves[name] = [
                found[id(site)] - original if id(site) in found else torch.zeros_like(original)
                for site, original in zip(self.movable.sites, self.movable.originals, strict=True)
            ]
        return self.moves[name]


def cells(choice: StudyChoice) -> list[Cell]:
    """Random directions, rays, the points of the slice and its lines."""
    grid = STUDY.sizes[choice.size].grid
    check_folders(choice.folders, choice.model)
    count = choice.options.get("directions", grid["directions"])
    if count < 1:
        raise FewbitError(f"--directions must be at least 1, not {count}")
    names = list(_folders(choice))
    found: list[Cell] = [{"what": "direction", "kind": kind, "index": i} for kind in KINDS for i in range(count)]
    found += [{"what": "ray", "name": name} for name in names]
    pair = _pair(choice, names)
    if pair:
        found.append({"what": "points", "pair": pair})
        found += [{"what": "line", "index": index, "pair": pair} for index in range(grid["plane"])]
    return found


def _pair(choice: StudyChoice, names: list[str]) -> list[str]:
    """The two whose plane is drawn: those asked for, else the named folders first, else the last two variants."""
    asked = list(choice.options.get("slice", ()))
    if asked and (len(asked) != 2 or asked[0] == asked[1] or not set(asked) <= set(names)):
        raise FewbitError(f"--slice: choose two of {', '.join(names)}, not {','.join(asked)}")
    return asked or (names[:2] if len(choice.folders) > 1 else names[-2:] if len(names) > 1 else [])


def _variants(choice: StudyChoice) -> list[Variant]:
    """Those asked for; with folders and no methods, none but the folders."""
    grid = STUDY.sizes[choice.size].grid
    if choice.folders and not choice.methods and not choice.bits:
        return []
    return variants(choice.methods or grid["methods"], choice.bits or grid["bits"], (None,))


def _folders(choice: StudyChoice) -> dict[str, Path]:
    """Name -> folder of everything that a ray leads to."""
    names = [Path(folder).resolve().name for folder in choice.folders]
    made = [variant.name for variant in _variants(choice)]
    both = sorted(set(names) & set(made))
    if both:
        raise FewbitError(f"--folder: the study itself makes a folder named {both[0]}: rename yours")
    return {
        **dict(zip(names, map(Path, choice.folders), strict=True)),
        **{name: choice.work / name for name in made},
    }


def prepare(choice: StudyChoice, progress: Progress | None) -> None:
    """Make the quantized folders; they stay until the study is finished."""
    wanted = _variants(choice)
    measure_once(choice, wanted, progress)
    for done, variant in enumerate(wanted):
        if progress:
            progress(done, len(wanted), f"quantizing {variant.name}")
        make_variant(variant, choice)


def open_cells(choice: StudyChoice) -> Opened:
    """The model in float32, so that small steps are not rounded away, and the windows."""
    checkpoint, network = open_original(choice.model, choice.device)
    network.model.float()
    sites = [site for block in network.sites for site in block]
    windows = read_windows(locate(choice.model), read_text(choice.data), choice.protocol)[0]
    return Opened(choice, checkpoint, Movable(network.model, sites), windows, _folders(choice))


def run_cell(cell: Cell, opened: Opened, tell: Tell) -> list[Row]:
    """Rows of the tables `direction`, `ray`, `point` and `plane`, one for each loss."""
    if cell["what"] == "direction":
        return _direction(cell, opened, tell)
    if cell["what"] == "ray":
        return _ray(cell["name"], opened, tell)
    return _plane(cell, opened, tell)


def _direction(cell: Cell, opened: Opened, tell: Tell) -> list[Row]:
    grid = STUDY.sizes[opened.choice.size].grid
    seed = 1000 * opened.choice.seed + 2 * cell["index"] + KINDS.index(cell["kind"])
    direction = random_direction(opened.movable.originals, cell["kind"], seed)
    places = [*(-r for r in reversed(grid["radii"])), 0.0, *grid["radii"]]
    common = {"table": "direction", "kind": cell["kind"], "index": cell["index"]}
    rows = []
    for done, place in enumerate(places):
        with opened.movable.moved((place, direction)):
            rows.append({**common, "distance": place, "loss": loss(opened.movable.model, opened.windows)})
        tell((done + 1) / len(places), f"{cell['kind']} direction {cell['index'] + 1}")
    return rows


def _ray(name: str, opened: Opened, tell: Tell) -> list[Row]:
    """From before the original (t = 0) through the quantized weights (t = 1) to beyond."""
    count = STUDY.sizes[opened.choice.size].grid["ray"]
    move = opened.move_to(name)
    length = norm(move) / opened.movable.norm
    config = open_checkpoint(locate(opened.folders[name]))
    recipe = recipe_of(config)
    common = {"table": "ray", "name": name, "method": describe(config)["method"], "bits": recipe.get("bits")}
    near = STEP / length if length else 0.0
    # Evenly from t = -0.25 to 1.5 in steps of 1.75/n, with 0, 1 and the step of the second difference among them.
    even = [-0.25 + 1.75 * i / count for i in range(count + 1)]
    places = sorted({round(t, 9) for t in [*even, 0.0, 1.0, near, -near]})
    rows = []
    for done, t in enumerate(places):
        with opened.movable.moved((t, move)):
            found = loss(opened.movable.model, opened.windows)
        rows.append({**common, "length": length, "t": t, "distance": t * length, "loss": found})
        tell((done + 1) / len(places), f"ray to {name}")
    return rows


def _plane(cell: Cell, opened: Opened, tell: Tell) -> list[Row]:
    """Points and lines in relative distances on the plane through the original and two others."""
    one, other = cell["pair"]
    first, second, (x, y) = plane_of(opened.move_to(one), opened.move_to(other))
    size = opened.movable.norm
    points = {"original": (0.0, 0.0), one: (norm(opened.move_to(one)), 0.0), other: (x, y)}
    if cell["what"] == "points":
        places = [{"table": "point", "name": n, "x": px / size, "y": py / size} for n, (px, py) in points.items()]
    else:
        count = STUDY.sizes[opened.choice.size].grid["plane"]
        across, up = ([p[axis] / size for p in points.values()] for axis in (0, 1))
        height = _spaced(up, count)[cell["index"]]
        places = [{"table": "plane", "x": float(v), "y": float(height)} for v in _spaced(across, count)]
    rows = []
    for done, place in enumerate(places):
        with opened.movable.moved((place["x"] * size, first), (place["y"] * size, second)):
            rows.append({**place, "loss": loss(opened.movable.model, opened.windows)})
        tell((done + 1) / len(places), f"slice through {one} and {other}")
    return rows


def _spaced(values: list[float], count: int) -> list[float]:
    """`count` even places that reach beyond all values by a margin."""
    width = max(values) - min(values)
    return list(np.linspace(min(values) - _MARGIN * width, max(values) + _MARGIN * width, count).tolist())


STUDY = Study(
    name="landscape",
    title="The loss landscape around the weights",
    about="Distances are relative: the norm of the displacement over the norm of the linear layers' weights.",
    sizes={
        "quick": Size(4, 256, 16, 256, _QUICK),
        "standard": Size(16, 512, 128, 512, _STANDARD),
        "large": Size(32, 1024, 128, 512, _LARGE),
    },
    cells=cells,
    run_cell=run_cell,
    summarize=summarize,
    draw=draw,
    open=open_cells,
    prepare=prepare,
)
