"""The command that forecasts a run: plan."""

from typing import Annotated, Any

import typer

from fewbit.cli_shared import (
    CalibrationOption,
    JsonFlag,
    LengthOption,
    MemoryOption,
    SamplesOption,
    announce,
    calibration_choice,
    print_json,
)
from fewbit.options import BITS


def plan(
    model: Annotated[str, typer.Argument(help="A folder, a .gguf file, a name from `fewbit models`, or a hub name.")],
    method: Annotated[str, typer.Option(help="The method, as for `fewbit quantize`.")] = "adpq+",
    bits: Annotated[float | None, typer.Option(help=BITS.help)] = None,
    group_size: Annotated[str | None, typer.Option(help="Group size: N, auto, row, or a list: 64,auto.")] = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    sequence_length: LengthOption = None,
    refresh: Annotated[
        str, typer.Option(help="When to measure the Fisher: once, block, or a number of blocks.")
    ] = "once",
    memory: MemoryOption = None,
    include: Annotated[list[str] | None, typer.Option(help="Also quantize tensors that match this pattern.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Do not quantize tensors that match this.")] = None,
    tensor_choices: Annotated[
        list[str] | None, typer.Option("--set", help="PATTERN:NAME=VALUE: different choices for some tensors.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what `quantize` would do: weights, bits, size, and estimated time, memory and disk space. Writes nothing.

    Examples:

      fewbit plan smollm2-135m --method precal+oac --bits 2

      fewbit plan ./llama --method rtn --bits 4 --group-size 96
    """
    from fewbit.pipeline.calibration_options import CalibrationOptions, parse_refresh
    from fewbit.pipeline.forecast import forecast
    from fewbit.recipe_choices import recipe_from_choices
    from fewbit.report.text import plan_text
    from fewbit.sizes import parse_size

    choices: dict[str, Any] = {"bits": bits, "group_size": group_size}
    choices["sets"] = tuple(tensor_choices or ())
    lists = {"include": tuple(include or ()), "exclude": tuple(exclude or ())}
    recipe = recipe_from_choices(method, {**choices, **lists})
    options = CalibrationOptions(
        calibration_choice(sources=calibration, samples=samples, sequence_length=sequence_length),
        refresh=parse_refresh(refresh),
        memory_bytes=parse_size(memory) if memory else 0,
    )
    announce(model)
    result = forecast(model, recipe, options)
    if as_json:
        print_json(result)
    else:
        print(plan_text(result))
