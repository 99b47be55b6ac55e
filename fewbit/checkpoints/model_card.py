"""The model card of a written folder: README.md with what the hub reads at its top, ready to upload.

It states what the report of the folder holds, and nothing else; it is the same for the same input.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.checkpoints.front_matter import front_matter, read_front_matter
from fewbit.checkpoints.json_file import read_json, write_whole
from fewbit.checkpoints.named import NAMED_MODELS
from fewbit.checkpoints.own_files import CARD, CARD_MARK, ORIGINAL_CARD, REPORT, is_own, is_own_card
from fewbit.checkpoints.public_names import hub_name_of, is_hub_name, public_model
from fewbit.printable import one_line
from fewbit.sizes import show_size

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LINK = re.compile(r"https?://[^\s<>\"']{1,300}")
_NAME = re.compile(r"[\w .+/()-]{1,100}")
_LOADED = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""


@dataclass(frozen=True)
class Base:
    """The original model. name: for readers. hub: its name on the hub, if known. licence: entries of the front matter.

    An empty `licence` means that none is known. has_card: whether the card of the original is beside the new one.
    """

    name: str
    hub: str | None
    licence: Mapping[str, str]
    has_card: bool = False


@dataclass(frozen=True)
class Written:
    """What a card describes. form: a row of LOADERS. file: the file of the weights, if a runtime asks for it.

    report: the content of `fewbit_report.json`, or what is known of it.
    """

    form: str
    report: Mapping[str, Any]
    bytes: int
    file: str = ""


@dataclass(frozen=True)
class Loader:
    """How a form of weights is loaded. library: as the hub names it. tags: for the hub. text: of the card."""

    library: str
    tags: tuple[str, ...]
    text: Callable[[str], str]


def _native(_: str) -> str:
    return """With transformers (`pip install 'fewbit[hf,fast]'`); the weights stay packed in memory:

```python
import fewbit
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

In a terminal, and as plain 16-bit weights for every other program:

```sh
fewbit chat FOLDER
fewbit unpack FOLDER FOLDER-16bit
```
"""


def _plain(_: str) -> str:
    return f"""The weights are plain 16-bit ones, which every program loads that loads the original, such as
transformers and vLLM (`vllm serve FOLDER`).

{_LOADED}"""


def _gguf(file: str) -> str:
    return f"""With llama.cpp:

```sh
llama-server -m {file}
llama-cli -m {file} -p "Hello"
```

With Ollama, write a `Modelfile` with the line `FROM ./{file}`, then `ollama create NAME -f Modelfile`. LM Studio and
other programs that are built on llama.cpp open the file itself.
"""


def _of_package(package: str) -> Callable[[str], str]:
    """Loaded by transformers with the package of a format, and by vLLM."""
    return lambda _: (
        f"""With transformers (`pip install transformers {package}`):

{_LOADED}
With vLLM, for bit-widths and grids that it has kernels for:

```sh
vllm serve FOLDER
```
"""
    )


def _mlx(_: str) -> str:
    return """With MLX (`pip install mlx-lm`):

```sh
mlx_lm.generate --model FOLDER --prompt "Hello"
mlx_lm.server --model FOLDER
```
"""


LOADERS: dict[str, Loader] = {
    "native": Loader("transformers", ("fewbit", "quantized"), _native),
    "plain": Loader("transformers", ("fewbit",), _plain),
    "gguf": Loader("gguf", ("fewbit", "quantized", "gguf"), _gguf),
    "compressed-tensors": Loader(
        "transformers", ("fewbit", "quantized", "compressed-tensors"), _of_package("compressed-tensors")
    ),
    "gptq": Loader("transformers", ("fewbit", "quantized", "gptq"), _of_package("gptqmodel")),
    "awq": Loader("transformers", ("fewbit", "quantized", "awq"), _of_package("gptqmodel")),
    "mlx": Loader("mlx", ("fewbit", "quantized", "mlx"), _mlx),
}
"""Form of the weights -> how it is loaded. A form without a row has a card without that section."""


def base_of(folder: Path, model: str, config: Mapping[str, Any]) -> Base:
    """The original model of a run. folder: where it was read. model: its public name. config: of the folder.

    A folder that fewbit wrote passes on what its own card says. Of an original, the name on the hub is known if it
    came from there or is a named model, and the licence if its card, its config or the table of named models has one.
    """
    path = folder / CARD
    card = read_front_matter(path)
    if is_own_card(path):
        hub, report = card.get("base_model"), read_json(folder / REPORT) if is_own(folder / REPORT) else None
        known = report.get("model") if isinstance(report, dict) else None
        name = public_model(known) if isinstance(known, str) else model
        hub = hub if isinstance(hub, str) and is_hub_name(hub) else None
        return Base(name, hub, _licence(card), (folder / ORIGINAL_CARD).is_file())
    named = NAMED_MODELS.get(model)
    if named is not None:
        return Base(model, named.hub, {"license": named.licence_id})
    found = _licence(card) or _licence({"license": config.get("license")})
    hub = hub_name_of(folder) or (model if "/" in model and is_hub_name(model) else None)
    return Base(model, hub, found, path.is_file())


def write_card(path: Path, base: Base, written: Written) -> None:
    """Write the card of a folder."""
    write_whole(path, card(base, written).encode("utf-8", "backslashreplace"))


def card(base: Base, written: Written) -> str:
    """The text of a card."""
    loader, report = LOADERS.get(written.form), written.report
    recipe = report.get("recipe") or {}
    bits = recipe.get("bits")
    width = f"{bits:g}" if isinstance(bits, int | float) else ""
    # A 16-bit model in another format has no recipe.
    is_packed = written.form != "plain" and bool(recipe)
    tags = [tag for tag in (loader.tags if loader else ("fewbit", "quantized")) if recipe or tag != "quantized"]
    if width and is_packed:
        tags.append(f"{width}-bit")
    head: dict[str, Any] = {}
    if base.hub is not None:
        head |= {"base_model": base.hub, **({"base_model_relation": "quantized"} if is_packed else {})}
    head |= {**base.licence, "library_name": loader.library if loader else "transformers", "tags": tags}
    name = _words(base.name)
    title = f"{name}, quantized" if is_packed else f"{name}, quantized and unpacked to 16 bits"
    if not recipe:
        title = f"{name} as {written.form}" if written.form != "plain" else f"{name} in 16 bits"
    if width and is_packed:
        title += f" to {width} {'bit' if bits == 1 else 'bits'}"
    parts = [
        f"{front_matter(head)}\n{CARD_MARK}\n\n# {title}",
        _introduction(base, report),
        _table(written),
        f"## Recipe\n\n```json\n{json.dumps(recipe, indent=1, ensure_ascii=True)}\n```" if recipe else "",
        _licence_text(base),
    ]
    if loader is not None:
        parts.append(f"## Use it\n\n{loader.text(written.file).strip()}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(base: Base, report: Mapping[str, Any]) -> str:
    made = f"fewbit {report['fewbit_version']}" if report.get("fewbit_version") else "fewbit"
    original = f"[{base.hub}](https://huggingface.co/{base.hub})" if base.hub else _words(base.name)
    recipe = report.get("recipe") or {}
    tool = (recipe.get("imported") or {}).get("tool")
    if tool:
        done = f"Its weights were quantized by another tool ({_words(str(tool))}) and read by {_words(made)}."
    else:
        done = f"Its weights were {'quantized' if recipe else 'converted'} with {_words(made)}."
    return f"The original is {original}. {done}"


def _table(written: Written) -> str:
    """What the report has, as a table: method, sizes, text, and figures that were measured when it was made."""
    report, output = written.report, written.report.get("output") or {}
    source = report.get("source") or {}
    calibration = (report.get("calibration") or {}).get("calibration") or {}
    tuning = report.get("tuning") or {}
    losses = (tuning.get("history") or {}).get("held_out") or []
    best = (tuning.get("history") or {}).get("best_epoch", 0)
    rows = [
        ("method", report.get("method")),
        ("inputs of the linear layers", _inputs(written)),
        ("bits per weight of the linear layers", _number(output.get("bits_per_weight"))),
        ("bits per weight of the whole model", _number(output.get("bits_per_weight_all"))),
        ("size of the weight files", show_size(written.bytes)),
        ("size of the original", show_size(source["bytes"]) if source.get("bytes") else None),
        ("calibration set", _text_used(calibration)),
        ("tuned on", _text_used(tuning.get("calibration") or {})),
        ("held-out loss before and after tuning", _before_and_after(losses, best)),
        ("relative squared error of the weights", _mean_error(report.get("layers") or [])),
    ]
    lines = [f"| {name} | {_cell(str(value))} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _inputs(written: Written) -> str | None:
    bits = (written.report.get("recipe") or {}).get("input_bits")
    return f"rounded to {bits} bits per token at run time" if bits and written.form != "plain" else None


def _text_used(described: Mapping[str, Any]) -> str | None:
    if not described.get("sources"):
        return None
    size = f"{described.get('samples')} sequences of {described.get('sequence_length')} tokens"
    return f"{described['sources']}, {size}"


def _before_and_after(losses: list[float], best: int) -> str | None:
    return f"{losses[0]:.4f}, {losses[best]:.4f}" if 0 <= best < len(losses) else None


def _mean_error(layers: list[Mapping[str, Any]]) -> str | None:
    """The mean over the layers; None unless it is known of all."""
    errors = [layer.get("relative_squared_error") for layer in layers]
    known = [error for error in errors if isinstance(error, int | float)]
    return f"{sum(known) / len(known):.5f} (mean over layers)" if known and len(known) == len(errors) else None


def _licence_text(base: Base) -> str:
    named = base.licence.get("license_name") or base.licence.get("license")
    said = f"The licence of the original applies: {_words(named)}" if named else "The licence of the original applies"
    link = base.licence.get("license_link")
    own = f" Its own card is `{ORIGINAL_CARD}`." if base.has_card else ""
    return f"## Licence\n\n{said}{f' ({link})' if link else ''}.{own}"


def _licence(card: Mapping[str, Any]) -> dict[str, str]:
    """The entries of a front matter about the licence, as far as they have the form that the hub takes."""
    found = {}
    for key, form in (("license", _LICENCE), ("license_name", _NAME), ("license_link", _LINK)):
        value = card.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and form.fullmatch(value.lower() if key == "license" else value):
            found[key] = value.lower() if key == "license" else value
    return found if "license" in found else {}


def _number(value: Any) -> str | None:
    return f"{value:.2f}" if isinstance(value, int | float) else None


def _words(text: str) -> str:
    """Text from outside in a line of Markdown, without its marks."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", one_line(text, 200))


def _cell(text: str) -> str:
    return _words(text)
