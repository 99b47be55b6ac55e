"""Options of calibrated runs that are not part of the recipe."""

from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Any

from fewbit.calibration.choice import CalibrationChoice
from fewbit.choices import check_values, flag_names
from fewbit.curvature.store import StoredCurvature
from fewbit.errors import FewbitError
from fewbit.memory import available_bytes
from fewbit.recipe import Recipe


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of a calibrated run that are not part of the recipe.

    choice: the calibration set. stored: a measured curvature to use instead. refresh: for the Fisher, 0 to measure all
    blocks once, otherwise the number of blocks that are measured at a time with the preceding blocks already quantized.
    original_inputs: compute the Gram of a block from the inputs in the original model instead of those in the quantized
    one. memory_bytes: limit for hidden states and curvature; 0 for half of the free memory. max_fallback: how many
    weights may fall back to rounding.
    """

    choice: CalibrationChoice = field(default_factory=CalibrationChoice)
    _: KW_ONLY
    stored: StoredCurvature | None = None
    refresh: int = 0
    original_inputs: bool = False
    memory_bytes: int = 0
    max_fallback: int = 0

    def __post_init__(self) -> None:
        check_values(self, {**flag_names(self), "memory_bytes": "--memory"})
        if self.refresh < 0 or self.max_fallback < 0 or self.memory_bytes < 0:
            raise FewbitError("--refresh, --max-fallback and --memory cannot be negative")

    @property
    def memory(self) -> int:
        """Bytes that hidden states and curvature may take."""
        return self.memory_bytes or available_bytes() // 2

    def describe(self) -> dict[str, Any]:
        """The options that change the resulting weights."""
        if self.stored:
            return {"calibration": self.stored.description, "stored_curvature": asdict(self.stored.choice)}
        return {
            "calibration": asdict(self.choice),
            "refresh": self.refresh,
            "original_inputs": self.original_inputs,
        }


def share_of_stored(recipe: Recipe, stored: StoredCurvature) -> Recipe:
    """The recipe with the Gram share of a stored curvature; a method without a share keeps its own setting."""
    if recipe.curvature is None or not recipe.curvature.gram_share or not stored.choice.source.gradients:
        return recipe
    return replace(recipe, curvature=replace(recipe.curvature, gram_share=stored.choice.gram_share))


def check_fit(recipe: Recipe, options: CalibrationOptions) -> None:
    """Raises FewbitError if the recipe cannot use an option, or if a stored curvature is not the kind that it needs."""
    wanted = recipe.curvature
    assert wanted is not None
    if options.refresh and (not wanted.source.gradients or options.stored):
        raise FewbitError("--refresh: only a Fisher that is measured in this run can be refreshed")
    if options.original_inputs and (wanted.source.gradients or options.stored):
        raise FewbitError("--original-inputs: applies only to a Gram that is measured in this run")
    if options.stored is None:
        return
    if recipe.transform.kind.from_largest:
        raise FewbitError(
            f"{options.stored.folder}: {recipe.transform.name} needs the largest inputs, which no stored curvature "
            "has: give --calibration instead of --curvature"
        )
    found = options.stored.choice
    if found.kind != wanted.kind:
        raise FewbitError(
            f"{options.stored.folder}: contains a {found.kind}, but {recipe.method} needs a {wanted.kind}"
        )
    if found.diagonal and not wanted.diagonal and recipe.solver.method.compensates:
        raise FewbitError(
            f"{options.stored.folder}: contains only diagonals, with which {recipe.method} would do no more than "
            "rounding: measure again without --diagonal"
        )
    if found.tempering != wanted.tempering:
        raise FewbitError(
            f"{options.stored.folder}: was measured with tempering {found.tempering:g}, not {wanted.tempering:g}: pass "
            f"--tempering {found.tempering:g}, or measure again"
        )
    if found.gram_share != wanted.gram_share:
        raise FewbitError(
            f"{options.stored.folder}: was measured with a Gram share of {found.gram_share:g}, not "
            f"{wanted.gram_share:g}: measure again with  fewbit curvature … --gram-share {wanted.gram_share:g}, or "
            f"pass --gram-share {found.gram_share:g} here"
        )
    for name in ("terms", "labels"):
        has, needs = getattr(found, name), getattr(wanted, name)
        if found.source.gradients and has != needs:
            raise FewbitError(
                f"{options.stored.folder}: its Fisher was measured with {name} {has!r}, not {needs!r}: pass "
                f"--fisher-{name} {has}, or measure again"
            )


def flags(options: dict[str, Any]) -> str:
    """The options that were given (not None), as on the command line, separated by commas."""
    names = {"sources": "calibration"}
    return ", ".join(
        f"--{names.get(key, key).replace('_', '-')}" for key, value in options.items() if value is not None
    )


def refuse_unused(recipe: Recipe, text: dict[str, Any], others: dict[str, Any], tuned: bool = False) -> None:
    """Raises FewbitError if options were given (are not None) that the recipe would silently ignore.

    text: the fields of the calibration set. others: the remaining options of calibrated runs, by name. tuned: the text
    is also used for fine-tuning.
    """
    if tuned:
        text = {}
    if text.get("sources") == "none":
        # Methods without calibration do this anyway.
        text = {**text, "sources": None}
    given = flags({**text, **others})
    if given and recipe.curvature is None:
        raise FewbitError(
            f"{given}: {recipe.method} uses no data: choose a calibrated method, e.g. --method precal+oac"
        )
    drawn = flags({**text, "memory": others.get("memory")})
    if drawn and others.get("curvature") is not None:
        raise FewbitError(f"{drawn}: with --curvature nothing is measured: omit it")


def parse_refresh(text: str) -> int:
    """`once` -> 0, `block` -> 1, a number K -> K; raises FewbitError for anything else."""
    if text in ("once", "block"):
        return 0 if text == "once" else 1
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise FewbitError(f"--refresh must be once, block or a number of blocks, not {text!r}")
