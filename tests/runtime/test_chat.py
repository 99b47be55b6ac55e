"""Talking with a model: what is shown, what is kept between turns, and what the command prints."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, byte_tokenizer, run_cli
from runtime_models import build

import fewbit
from fewbit.errors import FewbitError
from fewbit.printable import printable_text
from fewbit.runtime import chat
from fewbit.runtime.chat import ChatChoice, Conversation, TooLongError, open_conversation
from fewbit.runtime.stream import Stream

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[{{ m.content }}]{% elif m.role == 'user' %}"
    "<{{ m.content }}>{% else %}={{ m.content }}|{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)
GREEDY = ChatChoice(max_new_tokens=12, temperature=0)
VOCABULARY = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama in float32 with a chat template."""
    top = tmp_path_factory.mktemp("talking")
    folder = build_tiny(top / "model", dtype="float32", max_position_embeddings=256, eos_token_id=None)
    _add_template(folder)
    fewbit.quantize(folder, top / "out", fewbit.preset("adpq+", bits=4, group_size="32"))
    return top / "out"


def _add_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def ignore(_: str) -> None:
    pass


def talk(conversation: Conversation, *prompts: str, keep: bool = True) -> list[str]:
    found = []
    for prompt in prompts:
        if not keep:
            conversation._kept = None
        found.append(conversation.ask(prompt, ignore).text)
    return found


def test_the_answer_is_that_of_generate(talking: Path) -> None:
    conversation = open_conversation(str(talking), GREEDY)
    shown: list[str] = []
    answer = conversation.ask("hello", shown.append)
    model, tokenizer = conversation._model, conversation._tokenizer
    ids = tokenizer("<s><hello>=", add_special_tokens=False, return_tensors="pt").input_ids
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert answer.text == "".join(shown) == tokenizer.decode(wanted, skip_special_tokens=True)
    assert (answer.prompt_tokens, answer.tokens) == (ids.shape[1], 12)
    assert not answer.is_whole and not answer.is_stopped
    assert 0 < answer.first_seconds < answer.seconds


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_kept_keys_give_the_same_answers(kind: str, tmp_path: Path) -> None:
    """With sliding windows that are shorter than the conversation, too."""
    window = {} if kind == "llama" else {"sliding_window": 8}
    build(tmp_path / "model", kind, "float32", num_key_value_heads=2, **{**VOCABULARY, **window})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = fewbit.load(tmp_path / "model")
    # Letters alone, since bytes that are no text are not the same tokens when they are read again.
    letters = {tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"}
    model.generation_config.suppress_tokens = sorted(set(range(256)) - letters)
    prompts = ("one", "two and more", "three")
    kept = Conversation(model, tokenizer, GREEDY, "m")
    read: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, options: read.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    found = talk(kept, *prompts)
    with_cache, read[:] = list(read), []
    assert found == talk(Conversation(model, tokenizer, GREEDY, "m"), *prompts, keep=False)
    hook.remove()
    assert sum(with_cache) < sum(read)


def test_a_template_that_changes_what_was_said_is_read_anew(talking: Path) -> None:
    conversation = open_conversation(str(talking), GREEDY)
    conversation._tokenizer.chat_template = TEMPLATE.replace("={{ m.content }}|", "=?|")
    assert talk(conversation, "a", "b") == talk(
        _with_template(talking, conversation._tokenizer.chat_template), "a", "b", keep=False
    )


def _with_template(folder: Path, template: str) -> Conversation:
    conversation = open_conversation(str(folder), GREEDY)
    conversation._tokenizer.chat_template = template
    return conversation


@pytest.mark.slow
def test_the_same_seed_gives_the_same_answers(talking: Path) -> None:
    def drawn(seed: int) -> list[str]:
        return talk(open_conversation(str(talking), ChatChoice(max_new_tokens=12, seed=seed)), "a", "b")

    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_models_end_ends_the_answer(talking: Path) -> None:
    conversation = open_conversation(str(talking), GREEDY)
    first = conversation.ask("hello", ignore)
    conversation = open_conversation(str(talking), GREEDY)
    third = conversation._tokenizer(first.text, add_special_tokens=False).input_ids[2]
    conversation._model.generation_config.eos_token_id = [third]
    answer = conversation.ask("hello", ignore)
    assert answer.is_whole and answer.tokens <= 3


def test_a_stopped_answer_stays_in_the_conversation(talking: Path) -> None:
    conversation = open_conversation(str(talking), GREEDY)
    shown: list[str] = []

    def stop(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    answer = conversation.ask("hello", stop)
    assert answer.is_stopped and not answer.is_whole and answer.text.startswith("".join(shown))
    assert conversation._messages[-1] == {"role": "assistant", "content": answer.text}
    assert conversation._kept is None
    assert conversation.ask("go on", ignore).tokens == 12


def test_a_model_without_a_template_continues_each_text(tiny: Path) -> None:
    conversation = open_conversation(str(tiny), GREEDY)
    assert not conversation.has_template
    first = conversation.ask("abc", ignore)
    assert first.prompt_tokens == 3
    assert talk(conversation, "abc", "abc") == [first.text, first.text]
    with pytest.raises(FewbitError, match="no chat template, so --system cannot be used"):
        open_conversation(str(tiny), ChatChoice(system="be kind"))
    with pytest.raises(FewbitError, match="the prompt is empty"):
        conversation.ask("", ignore)


def test_a_template_that_takes_no_system_message(talking: Path) -> None:
    conversation = open_conversation(str(talking), ChatChoice(system="be kind"))
    conversation._tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(FewbitError, match="no system message: leave out --system"):
        conversation.ask("hello", ignore)


def test_long_conversations(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "model", max_position_embeddings=32, eos_token_id=None)
    _add_template(folder)
    conversation = open_conversation(str(folder), ChatChoice(max_new_tokens=20, temperature=0))
    # Thirteen tokens of prompt and template leave room for nineteen.
    assert conversation.ask("123456789", ignore).tokens == 19
    with pytest.raises(TooLongError, match="but the model's maximum length is 32: shorten it"):
        conversation.ask("123456789", ignore)
    assert conversation.restart()
    assert not conversation.restart()
    assert conversation.ask("123456789", ignore).tokens == 19


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens must be 1 or more"),
        ({"temperature": -1}, "--temperature must be 0"),
        ({"temperature": float("nan")}, "--temperature must be a finite number"),
        ({"seed": -1}, "--seed must be 0 or more"),
    ],
)
def test_choices_are_checked(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(FewbitError, match=said):
        ChatChoice(**changes)


def test_logits_that_are_not_finite(tiny: Path) -> None:
    conversation = open_conversation(str(tiny), GREEDY)
    with torch.no_grad():
        conversation._model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FewbitError, match="logits are NaN or infinite after 3 tokens"):
        conversation.ask("abc", ignore)


def test_the_quantized_cache_names_its_packages(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_backends", lambda: {"quanto": ("optimum-quanto", False, {})})
    with pytest.raises(FewbitError, match="--quantized-cache needs the package optimum-quanto: pip install"):
        open_conversation(str(talking), ChatChoice(quantized_cache=True))


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_the_quantized_cache_with_any_number_of_heads_and_tokens(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HQQ packs groups in pairs, so a group must not be as long as a head; skips without the backend's package."""
    found = chat._backends()[backend]
    if not found[1]:
        pytest.skip(f"{found[0]} is not installed")
    monkeypatch.setattr(chat, "_backends", lambda: {backend: found})
    for size, heads in ((64, 3), (16, 1), (80, 3)):
        sizes = {"head_dim": size, "num_attention_heads": heads, "num_key_value_heads": heads}
        build(tmp_path / str(size), "llama", **{**VOCABULARY, **sizes})
        choice = ChatChoice(max_new_tokens=9, temperature=0, quantized_cache=True)
        conversation = Conversation(fewbit.load(tmp_path / str(size)), byte_tokenizer(), choice, "m")
        assert [conversation.ask(prompt, ignore).tokens for prompt in ("ab", "abc")] == [9, 9]


def test_the_quantized_cache_of_transformers(talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import cache_utils

    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this version of transformers has no quantized cache without further packages")
    monkeypatch.setattr(chat, "_backends", lambda: {"fp8": ("torch", True, {})})
    conversation = open_conversation(str(talking), ChatChoice(max_new_tokens=12, temperature=0, quantized_cache=True))
    assert [conversation.ask(prompt, ignore).tokens for prompt in ("a", "b")] == [12, 12]
    build(tmp_path / "model", "gemma3_text", **{**VOCABULARY, "sliding_window": 8})
    with pytest.raises(FewbitError, match=r"cannot use --quantized-cache .*: leave it out"):
        Conversation(fewbit.load(tmp_path / "model"), byte_tokenizer(), ChatChoice(quantized_cache=True), "m")


def test_text_is_shown_once_its_characters_are_whole() -> None:
    tokenizer, shown = byte_tokenizer(), []
    text = "aé €\n  b"
    stream = Stream(tokenizer, shown.append, lambda: 0.0)
    stream.put(torch.tensor([[1, 2]]))
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        stream.put(torch.tensor([token]))
    stream.end()
    assert shown == list(text)
    assert stream.text == text


def test_what_a_terminal_must_not_get() -> None:
    assert printable_text("a\n\tb\x1b[2J\u202e\r") == "a\n\tb\\x1b[2J\\u202e\\r"
    assert printable_text("می\u200cخواهم") == "می\u200cخواهم"


@pytest.mark.slow
def test_one_prompt_from_the_command_line(talking: Path) -> None:
    words = ("chat", talking, "--prompt", "hello", "--temperature", "0", "--max-new-tokens", "12")
    result = run_cli(*words)
    text = open_conversation(str(talking), GREEDY).ask("hello", ignore).text
    assert result.stdout == f"{printable_text(text)}\n"
    assert result.stderr.startswith("fewbit: 12 tokens in ") and "tokens/s" in result.stderr
    found = json.loads(run_cli(*words, "--json").stdout)
    assert found["answers"][0]["text"] == text
    assert found["models"][0]["name"] == str(talking) and found["models"][0]["method"] == "adpq+"


@pytest.mark.slow
def test_each_line_of_standard_input_is_a_message(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("chat", talking, "--temperature", "0", "--max-new-tokens", "12", "--json")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    answers = json.loads(run_cli(*words).stdout)["answers"]
    assert [one["prompt"] for one in answers] == ["one", "two"]
    assert [one["text"] for one in answers] == talk(open_conversation(str(talking), GREEDY), "one", "two")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    answers = json.loads(run_cli(*words, "--prompt", "-").stdout)["answers"]
    assert [one["prompt"] for one in answers] == ["one\ntwo"]
    for data in (b"a\xffb\n", b"\xff"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        assert "standard input is not in UTF-8" in run_cli(*words, code=2).stderr


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal(talking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the prompt ends nothing, Ctrl-D ends; a conversation that is too long starts again."""
    typed = iter(["hello", KeyboardInterrupt, " ", "x" * 200, "x" * 100, EOFError])

    def answer(_: str) -> str:
        word = next(typed)
        if isinstance(word, str):
            return word
        raise word

    monkeypatch.setattr(sys, "stdin", _Terminal())
    monkeypatch.setattr("builtins.input", answer)
    result = run_cli("chat", talking, "--temperature", "0", "--max-new-tokens", "12")
    assert "Ctrl-C stops an answer, Ctrl-D ends" in result.stderr
    assert "maximum length is 256: shorten it: it starts again here" in result.stderr
    assert "fewbit: 36 tokens in " in result.stderr


def test_models_that_write_no_text(tmp_path: Path) -> None:
    build(tmp_path / "model", **VOCABULARY)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["architectures"] = ["LlamaModel"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(tmp_path / "model")
    assert "does not write text" in run_cli("chat", tmp_path / "model", "--prompt", "a", code=2).stderr


def test_folders_of_all_kinds(talking: Path, tmp_path: Path) -> None:
    fewbit.unpack(talking, tmp_path / "plain")
    assert talk(open_conversation(str(tmp_path / "plain"), GREEDY), "a") == talk(
        open_conversation(str(talking), GREEDY), "a"
    )
