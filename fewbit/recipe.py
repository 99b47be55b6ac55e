"""Recipes: one choice per axis. A published method is a row of the table PRESETS, not a class.

On the command line, in files and in :func:`preset` a recipe is flat, with the names of FIELDS. `sets` overrides choices
for some of the tensors.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from fewbit.architecture.patterns import matches
from fewbit.choices import check_values, nearest, plain_number
from fewbit.curvature.choice import CurvatureChoice
from fewbit.errors import FewbitError
from fewbit.grids.choice import GridChoice, ScaleChoice
from fewbit.grids.embeddings import KEPT, EmbeddingChoice, default_bits
from fewbit.grids.grid import ScaleSearch
from fewbit.grids.inputs import InputChoice
from fewbit.grids.scheme import Scheme
from fewbit.grids.table import chosen_grid
from fewbit.outliers.choice import OutlierChoice
from fewbit.outliers.rules import check_outlier_choice
from fewbit.presets import PRESETS, row_of
from fewbit.solvers.choice import SolverChoice
from fewbit.solvers.settled import WeightChoices
from fewbit.transforms.choice import TransformChoice

FIELDS: dict[str, tuple[str, str]] = {
    "transform": ("transform", "name"),
    "bits": ("grid", "bits"),
    "group_size": ("grid", "group_size"),
    "grid": ("grid", "name"),
    "search": ("grid", "search"),
    "column_weights": ("grid", "column_weights"),
    "scale_format": ("scales", "format"),
    "statistic_bits": ("scales", "statistic_bits"),
    "statistic_rows": ("scales", "statistic_rows"),
    "outliers": ("outliers", "rule"),
    "outlier_fraction": ("outliers", "fraction"),
    "outlier_scope": ("outliers", "scope"),
    "outlier_grid": ("outliers", "grid"),
    "outlier_bits": ("outliers", "bits"),
    "sensitivity": ("outliers", "sensitivity"),
    "embedding_bits": ("embeddings", "bits"),
    "input_bits": ("inputs", "bits"),
}
"""Flat name -> axis and parameter of that axis."""
_AXES = {
    "transform": TransformChoice,
    "grid": GridChoice,
    "scales": ScaleChoice,
    "outliers": OutlierChoice,
    "embeddings": EmbeddingChoice,
    "inputs": InputChoice,
}
_WHOLE = ("method", "curvature", "solver", "include", "exclude", "sets")
_BY_KIND: dict[str, Any] = {"solver": SolverChoice, "curvature": CurvatureChoice}
"""Choices whose kind may be given alone."""
_EARLIER = {"channel_scales": "transform"}
"""Names of fields in folders of earlier versions -> names now."""

TensorChoices = tuple[str, tuple[tuple[str, Any], ...]]
"""A pattern of tensor names, and choices by their flat names."""


@dataclass(frozen=True)
class Recipe:
    """How weights are quantized: one object per axis, each with its own parameters and checks.

    method: the preset on which the recipe is based. transform: an invertible map of the layers' inputs. outliers: which
    weights get a separate grid. curvature: how much an error costs, measured on a calibration set; None for data-free
    methods. grid, scales: which weight a code stands for, and how scales are stored. solver: how codes are chosen.
    include, exclude: patterns of tensor names. sets: choices for the tensors that match a pattern, such as
    ``("*.down_proj.weight", (("bits", 4),))``; if several patterns match, the last one that sets a choice wins.
    embeddings: how embeddings and output heads are stored. inputs: how the layers' inputs are rounded at run time.
    """

    method: str = "rtn"
    transform: TransformChoice = field(default_factory=TransformChoice)
    outliers: OutlierChoice = field(default_factory=OutlierChoice)
    curvature: CurvatureChoice | None = None
    grid: GridChoice = field(default_factory=GridChoice)
    scales: ScaleChoice = field(default_factory=ScaleChoice)
    solver: SolverChoice = field(default_factory=SolverChoice)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sets: tuple[TensorChoices, ...] = ()
    embeddings: EmbeddingChoice = field(default_factory=EmbeddingChoice)
    inputs: InputChoice = field(default_factory=InputChoice)

    def __post_init__(self) -> None:
        check_values(self)
        if self.embeddings.bits is None:
            object.__setattr__(self, "embeddings", EmbeddingChoice(default_bits(self.grid.width)))
        problems = (
            self.grid.refuses(self),
            check_outlier_choice(self),
            self.transform.refuses(self),
            self.solver.refuses(self),
            self.scales.refuses(self),
        )
        wrong = next((problem for problem in problems if problem), None)
        if wrong:
            raise FewbitError(wrong)
        for pattern, choices in self.sets:
            try:
                revised(replace(self, sets=()), dict(choices))
            except FewbitError as error:
                raise FewbitError(f"--set {pattern}: {error}") from error

    @property
    def bits(self) -> float:
        """Bits of a weight's code."""
        return self.grid.width

    def at(self, name: str, exact: Container[str] = ()) -> "Recipe":
        """The recipe of the tensor `name`. exact: as in :func:`fewbit.architecture.patterns.matches`."""
        if not self.sets:
            return self
        choices = {key: v for pattern, found in self.sets if matches(name, pattern, exact) for key, v in found}
        return revised(replace(self, sets=()), choices)

    def embedding_bits(self, name: str, exact: Container[str] = ()) -> int:
        """The bits of the embedding or head `name`. exact: as for :meth:`at`."""
        bits = self.embeddings.bits
        for pattern, found in self.sets:
            if matches(name, pattern, exact):
                bits = dict(found).get("embedding_bits", bits)
        assert bits is not None
        return bits

    def scheme(self, group_size: int) -> Scheme:
        """The stored form of a weight with groups of that size."""
        split, bits = self.outliers.wanted, self.bits
        statistics = self.scales.kind.has_statistics
        scheme = Scheme(
            bits=bits,
            group_size=group_size,
            grid=self.grid.grid.name,
            levels=self.grid.grid.levels(bits),
            scale_format=self.scales.format,
            outlier_grid=self.outliers.grid if split else "none",
            statistic_bits=self.scales.statistic_bits if statistics else 0,
            statistic_rows=self.scales.statistic_rows if statistics else 0,
            transform="none" if self.transform.kind.folded else self.transform.name,
            input_bits=self.inputs.stored,
        )
        return replace(
            scheme, outlier_bits=self.outliers.kind.bits(self.outliers.bits, scheme.whole_bits) if split else 0
        )

    def for_weight(self, scheme: Scheme) -> WeightChoices:
        """The choices that a solver needs, for a weight of that scheme."""
        return WeightChoices(scheme, self.grid.search, self.outliers, self.solver)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a flat dict of JSON values; :meth:`from_dict` is the inverse."""
        data: dict[str, Any] = {"method": self.method}
        for name, (axis, parameter) in FIELDS.items():
            data[name] = getattr(getattr(self, axis), parameter)
        data["search"] = asdict(self.grid.search) if self.grid.search else None
        data["curvature"] = asdict(self.curvature) if self.curvature else None
        data["solver"] = asdict(self.solver)
        data["include"], data["exclude"] = list(self.include), list(self.exclude)
        if not self.inputs.stored:
            del data["input_bits"]
        if self.sets:
            data["sets"] = [[pattern, dict(choices)] for pattern, choices in self.sets]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """A recipe from the output of :meth:`to_dict`, also of earlier versions. FewbitError for an unknown key."""
        data = {_EARLIER.get(key, key): value for key, value in data.items()}
        # Earlier versions kept embeddings and heads.
        data.setdefault("embedding_bits", KEPT)
        _check_keys(data, (*FIELDS, *_WHOLE), "recipe keys")
        search, curvature = data.get("search"), data.get("curvature")
        data["search"] = ScaleSearch(**search) if search else None
        data["curvature"] = CurvatureChoice(**curvature) if curvature else None
        data["solver"] = SolverChoice(**data.get("solver", {}))
        data["include"], data["exclude"] = tuple(data.get("include", ())), tuple(data.get("exclude", ()))
        data["sets"] = sets_of(data.get("sets", ()))
        return with_choices(cls(), data)


def with_choices(recipe: Recipe, choices: Mapping[str, Any]) -> Recipe:
    """The recipe with some choices replaced, by their flat names. FewbitError for an unknown name.

    If no bits are chosen, a grid that has only one width uses that. Bits of embeddings that are the default follow the
    new bits.
    """
    _check_keys(choices, (*FIELDS, *_WHOLE), "choices")
    choices = {**brought_by(choices.get("grid")), **choices}
    if recipe.embeddings.bits == default_bits(recipe.bits):
        choices.setdefault("embedding_bits", None)
    if "grid" in choices and "bits" not in choices and choices["grid"] != recipe.grid.name:
        widths = replace(recipe.grid, name=choices["grid"], bits=None, column_weights="none").grid.widths
        if recipe.bits not in widths:
            choices["bits"] = None
    axes: dict[str, dict[str, Any]] = {}
    for name, value in choices.items():
        if name in FIELDS:
            axis, parameter = FIELDS[name]
            axes.setdefault(axis, {})[parameter] = value
    changed: dict[str, Any] = {axis: replace(getattr(recipe, axis), **new) for axis, new in axes.items()}
    whole = {name: _whole(name, choices[name], getattr(recipe, name)) for name in _WHOLE if name in choices}
    return replace(recipe, **changed, **whole)


def brought_by(name: Any) -> dict[str, Any]:
    """The choices on other axes that a grid determines, by its name in recipes."""
    grid = chosen_grid(name) if isinstance(name, str) else None
    return {} if grid is None else dict(grid.brings)


def _whole(name: str, value: Any, before: Any) -> Any:
    """A choice that is not a parameter of an axis; a kind or a pattern may be given by itself."""
    if isinstance(value, str) and name in _BY_KIND:
        return replace(before or _BY_KIND[name](), kind=value)
    if name in ("include", "exclude"):
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else value
    return value


def preset(method: str, **choices: Any) -> Recipe:
    """The recipe of a named method with some choices replaced, by their flat names (see FIELDS).

    Raises FewbitError for an unknown name.
    """
    check_method(method)
    choices = {name: plain_number(value) for name, value in choices.items()}
    if "sets" in choices:
        choices["sets"] = sets_of(choices["sets"])
    bits = choices.get("bits")
    width = bits if isinstance(bits, int | float) else GridChoice.bits or 4
    row = row_of(method, width)
    choices = {name: _whole(name, value, row.get(name)) for name, value in choices.items()}
    return with_choices(Recipe(), {"method": method, **row, **brought_by(choices.get("grid")), **choices})


def check_method(method: str) -> None:
    """FewbitError unless there is a preset of that name."""
    if method not in PRESETS:
        hint = nearest(method, PRESETS)
        raise FewbitError(f"unknown method {method!r}: choose from {', '.join(PRESETS)}{hint}")


def revised(recipe: Recipe, choices: Mapping[str, Any]) -> Recipe:
    """The recipe with different choices for some tensors. What the preset chooses by bit-width follows the new width.

    FewbitError for a choice that cannot differ between tensors, such as what is measured or how layers' inputs change.
    """
    _check_keys(choices, PER_TENSOR, "choices of tensors")
    solver = {key: choices[key] for key in ("damping",) if key in choices}
    flat = {key: value for key, value in choices.items() if key not in solver}
    if isinstance(flat.get("bits"), int | float) and recipe.method in PRESETS:
        before, now = row_of(recipe.method, recipe.bits), row_of(recipe.method, float(flat["bits"]))
        plain = Recipe().to_dict()
        for key in before.keys() | now.keys():
            if key in FIELDS and before.get(key) != now.get(key) and key not in flat:
                axis, parameter = FIELDS[key]
                if getattr(getattr(recipe, axis), parameter) == before.get(key, plain[key]):
                    flat[key] = now.get(key, plain[key])
    if flat.get("outlier_fraction") == 0:
        flat["outliers"] = "none"
    changed = with_choices(recipe, flat)
    return replace_solver(changed, **solver) if solver else changed


PER_TENSOR = (*(name for name in FIELDS if name not in ("transform", "search", "column_weights")), "damping")
"""Choices that can differ between tensors."""


def sets_of(given: Any) -> tuple[TensorChoices, ...]:
    """Choices for patterns of tensor names, from a mapping, from (pattern, mapping) pairs, or from --set strings."""
    pairs = given.items() if isinstance(given, Mapping) else [given] if isinstance(given, str) else given
    found: list[TensorChoices] = []
    for one in pairs:
        try:
            pattern, choices = _parse_set(one) if isinstance(one, str) else one
        except (TypeError, ValueError) as error:
            raise FewbitError(f"set: each entry must be a pattern and its choices, not {one!r}") from error
        if not isinstance(choices, Mapping):
            raise FewbitError(f"choices for {pattern!r} must be names and values, e.g. {{'bits': 4}}, not {choices!r}")
        found.append((pattern, tuple((name, plain_number(value)) for name, value in choices.items())))
    return tuple(found)


def _parse_set(text: str) -> tuple[str, dict[str, Any]]:
    """``PATTERN:NAME=VALUE,NAME=VALUE``."""
    before, equals, _ = text.partition("=")
    pattern, colon, _ = before.rpartition(":")
    if not (equals and colon and pattern):
        raise FewbitError(
            f"--set must have the form PATTERN:NAME=VALUE, e.g. '*.down_proj.weight:bits=4', not {text!r}"
        )
    choices: dict[str, Any] = {}
    for part in _split(text[len(pattern) + 1 :]):
        name, equals, value = part.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not value:
            raise FewbitError(f"--set {pattern}: {part!r} is not of the form NAME=VALUE")
        choices[name] = _value(name, value.strip())
    return pattern, choices


_KINDS = {
    **{name: {one.name: one.type for one in fields(_AXES[axis])}[own] for name, (axis, own) in FIELDS.items()},
    "damping": float,
}
"""The types of choices."""


def _split(text: str) -> list[str]:
    """Split at commas; a part without = belongs to the preceding part (``group_size=64,auto``)."""
    parts: list[str] = []
    for piece in text.split(","):
        if "=" in piece or not parts:
            parts.append(piece)
        else:
            parts[-1] += f",{piece}"
    return parts


def _value(name: str, text: str) -> Any:
    """A value of --set, in the type of its field; the name of an unknown choice is reported later."""
    kind = _KINDS.get(name, str)
    if kind is str:
        return text
    try:
        number = float(text)
    except ValueError as error:
        raise FewbitError(f"--set: {name} must be a number, not {text!r}") from error
    # Bits are whole numbers, except those of a few grids.
    return int(number) if number.is_integer() and kind is not float else number


def replace_solver(recipe: Recipe, **choices: Any) -> Recipe:
    """The recipe with some choices of its solver replaced."""
    return replace(recipe, solver=replace(recipe.solver, **choices))


def _check_keys(choices: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    unknown = sorted(set(choices) - set(known))
    if unknown:
        raise FewbitError(f"unknown {what}: {', '.join(unknown)}{nearest(unknown[0], known)}")
