"""What to expect of few bits without data, and which commands do better."""

import shlex

from fewbit.recipe import Recipe

_FEW, _FEWEST = 3, 2
_MEASURED = {
    3: "clearly worse text than at 4 bits: the perplexity of small models rises by two thirds or more",
    2: "a model that writes no sensible text",
}


def advice(model: str, recipe: Recipe, target: str | None = None) -> list[str]:
    """Lines for the user if the recipe measures no data and has 3 bits or fewer; otherwise none.

    target: the runtime of `--for`, if one was asked for.
    """
    if recipe.curvature is not None or recipe.bits > _FEW:
        return []
    bits = f"{recipe.bits:g} {'bit' if recipe.bits == 1 else 'bits'}"
    expected = _MEASURED[_FEW if recipe.bits > _FEWEST else _FEWEST]
    better = max(int(recipe.bits), _FEWEST)
    size = "of this size" if better == recipe.bits else f"of {better} bits"
    command = f"fewbit quantize {shlex.quote(model)} OUT{f' --for {target}' if target else ''}"
    return [
        f"{bits} without data: expect {expected}",
        f"a better model {size}:  {command} --method precal+oac --bits {better} --calibration self --tune"
        "  (self: text that the model writes; your own text file is better)",
        f"without data, 4 bits talk sense:  {command}",
    ]
