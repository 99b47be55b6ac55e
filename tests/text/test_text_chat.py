"""Conversations become text by the tokenizer's chat template, whatever form they are stored in, with one BOS."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tokenizer, run_cli
from tokenizers import processors

from fewbit.calibration.choice import CalibrationChoice
from fewbit.calibration.tokens import make_set
from fewbit.errors import FewbitError
from fewbit.evaluation.perplexity import Protocol
from fewbit.evaluation.text import read_text
from fewbit.evaluation.windows import read_windows

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
ASKED, SAID = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It's 4."}
RENDERED = "[user]What is 2 + 2?[assistant]It's 4."
FORMS: dict[str, Any] = {
    "messages": {"messages": [ASKED, SAID], "id": "one string column"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 2 "}, "+ 2?"]}, SAID]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASKED["content"]}, {"from": "gpt", "value": SAID["content"]}]
    },
    "pair": {"prompt": ASKED["content"], "completion": SAID["content"], "source": "x"},
    "pair of turns": {"prompt": [ASKED], "completion": [SAID]},
    "in the column text": {"text": [ASKED, SAID]},
}


def templated(template: str | None = TEMPLATE, adds_bos: bool = True) -> Any:
    tokenizer = byte_tokenizer()
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawn(source: Path | str, tokenizer: Any, length: int = 200, **options: Any) -> list[int]:
    return make_set(CalibrationChoice(str(source), 1, length, **options), tokenizer, 256).ids[0].tolist()


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(FewbitError) as error:
        drawn(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_conversations(tmp_path: Path, form: str, flag: bool) -> None:
    source = write(tmp_path / "a.jsonl", *[FORMS[form]] * 20)
    tokenizer = templated()
    ids = drawn(source, tokenizer, chat_template=flag)
    assert tokenizer.decode(ids[1:]) == (RENDERED * 20)[:199]
    assert ids.count(0) == 1
    assert ids[0] == 0


def test_conversations_in_other_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tokenizer = templated()
    rows = [{"id": "a", "messages": [ASKED, SAID]}] * 20
    (tmp_path / "a.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.json", "a.json:messages", "a.parquet", "a.parquet:messages"):
        assert tokenizer.decode(drawn(tmp_path / name, tokenizer)[1:]) == (RENDERED * 20)[:199]


def test_what_stands_beside_the_content(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}], "nothing": None}
    source = write(tmp_path / "a.jsonl", *[{"messages": [ASKED, call]}] * 20)
    tokenizer = templated(
        "{% for m in messages %}{{ m.content }}<{{ m.tool_calls and m.tool_calls[0].name }}>{{ m|length }}{% endfor %}"
    )
    assert tokenizer.decode(drawn(source, tokenizer)[1:]).startswith("What is 2 + 2?<>2<add>3What")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "a part of the kind 'image'"),
        ({"messages": [{"role": "user", "content": 3}]}, "a part of the kind 'int'"),
        ({"messages": [{"role": 3, "content": "a"}]}, "turn 1: its role is 3, not a string"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "turn 1: from 'narrator' is not a known speaker"),
        ({"messages": [{"role": "user", "content": "x\ud83d"}]}, "half of a surrogate pair"),
    ],
)
def test_turns_that_cannot_be_understood(tmp_path: Path, row: Any, message: str) -> None:
    line = refused(write(tmp_path / "a.jsonl", row), templated())
    assert f"{tmp_path / 'a.jsonl'}:1" in line
    assert message in line


def test_without_a_template(tmp_path: Path) -> None:
    line = refused(write(tmp_path / "a.jsonl", FORMS["messages"]), templated(None))
    assert "a.jsonl:1: chat messages need the tokenizer's chat template: the model's tokenizer has none: add a " in line


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must\n\x1b[31m alternate') }}", r"roles must \x1b[31m alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ messages[7]['content'] }}", "has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ tools | length }}", "no len()"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
@pytest.mark.parametrize("flag", [False, True])
def test_templates_that_refuse(tmp_path: Path, template: str, words: str, flag: bool) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "plain"} if flag else FORMS["messages"])
    line = refused(source, templated(template), chat_template=flag)
    assert words in line
    assert line.startswith("--chat-template: the" if flag else f"{source}:1: the")
    assert line.endswith("give conversations that it takes, or plain text without --chat-template")
    assert "\x1b" not in line


def test_faults_of_our_own_are_not_the_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = templated()

    def broken(*arguments: Any, **options: Any) -> str:
        raise KeyError("ours")

    monkeypatch.setattr(tokenizer, "apply_chat_template", broken)
    with pytest.raises(KeyError, match="ours"):
        drawn(write(tmp_path / "a.jsonl", FORMS["messages"]), tokenizer)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_one_bos(tmp_path: Path, adds_bos: bool, flag: bool) -> None:
    tokenizer = templated(adds_bos=adds_bos)
    for row in ({"text": "plain words"}, {"text": "<s>plain words"}, {"messages": [ASKED, SAID]}):
        ids = drawn(write(tmp_path / "a.jsonl", *[row] * 40), tokenizer, chat_template=flag)
        assert [0, 0] not in [ids[i : i + 2] for i in range(len(ids))] or row == {"text": "<s>plain words"}
        if adds_bos:
            assert ids[0] == 0 != ids[1]
    plain = drawn(write(tmp_path / "a.jsonl", *[{"text": "plain words"}] * 40), tokenizer)
    assert plain.count(0) == adds_bos


def test_evaluation_on_conversations(tiny: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *[{"messages": [ASKED, SAID]}] * 10)
    text = read_text(source)
    with pytest.raises(FewbitError, match="chat messages need the model's chat template"):
        text.content  # noqa: B018
    with pytest.raises(FewbitError, match="the model's tokenizer has none"):
        read_windows(tiny, text, Protocol(32, 2))
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for adds_bos in (False, True):
        tokenizer = templated(adds_bos=adds_bos)
        tokenizer.save_pretrained(folder)
        windows, bos = read_windows(folder, text, Protocol(32, 4))
        assert bos == adds_bos
        joined = "\n\n".join(("" if adds_bos else "<s>") + RENDERED for _ in range(10))
        expected = tokenizer(joined, add_special_tokens=False).input_ids
        body = [window[1:] if bos else window for window in windows.tolist()]
        assert body == [expected[32 * i : 32 * i + len(body[0])] for i in range(4)]
    assert text.sha256 == read_text(source).sha256
    run_cli("eval", folder, "--data", source, "--seq-len", 32, "--windows", 2, "--json")
