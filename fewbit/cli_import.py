"""The command `import`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbit.cli_shared import JsonFlag, announce, print_json, with_options
from fewbit.options import given_of
from fewbit.options_more import IMPORT
from fewbit.progress import progress_line


@with_options(IMPORT)
def import_command(
    source: Annotated[
        str,
        typer.Argument(help="A .gguf file, or a folder or hub name in the format of GPTQ, AWQ or compressed-tensors."),
    ],
    out: Annotated[Path, typer.Argument(help="The output folder.")],
    as_json: JsonFlag = False,
    **choices: Any,
) -> None:
    """Convert a checkpoint that another tool quantized to fewbit's format, without loss.

    Examples:

      fewbit import model-Q4_K_M.gguf folder

      fewbit eval folder --data wiki.txt --reference original
    """
    from fewbit.api import import_model
    from fewbit.report.text import import_summary
    from fewbit.versions import versions

    announce(source)
    with progress_line(f"importing {source}") as progress:
        report = import_model(source, out, progress=progress, **given_of(IMPORT, choices, "run"))
    if as_json:
        row = {
            "name": str(out),
            "method": report["method"],
            "bits_per_weight": report["output"]["bits_per_weight"],
            "bits_per_weight_all": report["output"]["bits_per_weight_all"],
            "bytes": report["output"]["file_bytes"],
            **report["run"],
        }
        print_json({"models": [row], "protocol": None, "versions": versions(), "report": report})
    else:
        print(import_summary(report, out))
