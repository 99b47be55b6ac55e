"""The command that forecasts a run: plan."""

from typing import Any

from fewbit.cli_shared import JsonFlag, MethodOption, ModelArgument, announce, print_json, read_foreign, with_options
from fewbit.options import PLAN


@with_options(PLAN)
def plan(model: ModelArgument, method: MethodOption = "adpq+", as_json: JsonFlag = False, **choices: Any) -> None:
    """Show what `quantize` would do: weights, bits, size, and estimated time, memory and disk space. Writes nothing.

    Examples:

      fewbit plan smollm2-135m --method precal+oac --bits 2

      fewbit plan ./llama --method rtn --bits 4 --group-size 96
    """
    from fewbit.api import plan as run
    from fewbit.report.text import plan_text

    announce(model)
    read_foreign(model, again=True)
    result = run(model, method, **choices)
    if as_json:
        print_json(result)
    else:
        print(plan_text(result))
