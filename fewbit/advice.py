"""What to expect of few bits without data, and which command does better."""

from fewbit.recipe import Recipe

_FEW = 3
_MEASURED = {
    3: "clearly worse text than at 4 bits: the perplexity of small models rises by two thirds or more",
    2: "a model that writes no sensible text",
}


def advice(model: str, recipe: Recipe) -> list[str]:
    """Lines for the user if the recipe measures no data and has 3 bits or fewer; otherwise none."""
    if recipe.curvature is not None or recipe.bits > _FEW:
        return []
    bits = f"{recipe.bits:g} {'bit' if recipe.bits == 1 else 'bits'}"
    expected = _MEASURED[3 if recipe.bits > 2 else 2]
    options = f"--method precal+oac --bits {max(int(recipe.bits), 1)} --calibration TEXT --tune"
    return [
        f"{bits} without data: expect {expected}",
        f"better at this size:  fewbit quantize {model} OUT {options}",
    ]
