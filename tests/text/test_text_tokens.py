"""Tokens of a text in pieces are those of the whole text, whatever the tokenizer and the text."""

import json
from array import array
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fewbit.errors import FewbitError
from fewbit.text.tokens import Sizes, first_tokens

TEXT = "\n".join(topics[name] for name in sorted(topics))[:120_000]
SMALL = Sizes(first=256, largest=1024, overlap=128, tokens=8)
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def wrap(inner: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


def trained(inner: Tokenizer, trainer: Any) -> Any:
    inner.train_from_iterator([TEXT[:40_000], "zażółć gęślą 12345 67890 (1,234,567)"] * 2, trainer)
    return wrap(inner)


def byte_level(split: Any = None, **options: Any) -> Any:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=options.pop("prefix", False), use_regex=split is None)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if split is not None else level
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=options.pop("trim", False))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<unk>"]
    return trained(inner, trainers.BpeTrainer(vocab_size=800, special_tokens=special, initial_alphabet=alphabet))


def byte_level_trimmed() -> Any:
    return byte_level(prefix=True, trim=True)


def like_llama_3() -> Any:
    return byte_level(pre_tokenizers.Split(Regex(LLAMA_3), "isolated"))


def digits_from_the_right() -> Any:
    threes = pre_tokenizers.Split(Regex(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))"), "isolated")
    return byte_level(pre_tokenizers.Sequence([threes, pre_tokenizers.Split(Regex(LLAMA_3), "isolated")]))


def like_llama_2() -> Any:
    """Merges run over the whole text; a space before the first word; bytes for what is unknown."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Trained on words, as sentencepiece does, and then run without them.
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = trained(inner, trainers.BpeTrainer(vocab_size=1000, special_tokens=special))
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["pre_tokenizer"] = None
    return wrap(Tokenizer.from_str(json.dumps(whole)))


def unigram(**options: Any) -> Any:
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    return trained(inner, trainers.UnigramTrainer(vocab_size=500, special_tokens=["<s>", "<unk>"], unk_token="<unk>"))


def unigram_first() -> Any:
    return unigram(prepend_scheme="first")


def unigram_unsplit() -> Any:
    """The likeliest split of the whole text, with no words first."""
    whole = json.loads(unigram().backend_tokenizer.to_str())
    whole["pre_tokenizer"]["split"] = False
    return wrap(Tokenizer.from_str(json.dumps(whole)))


def word_piece() -> Any:
    inner = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=60))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return trained(inner, trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<s>", "<unk>"]))


def words() -> Any:
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return trained(inner, trainers.WordLevelTrainer(vocab_size=500, special_tokens=["<s>", "<unk>"]))


def characters() -> Any:
    """No words at all: a token is a character, or a pair of them."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    return trained(inner, trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "<unk>"], max_token_length=2))


KINDS: list[Callable[[], Any]] = [
    byte_level,
    byte_level_trimmed,
    like_llama_3,
    digits_from_the_right,
    like_llama_2,
    unigram,
    unigram_first,
    unigram_unsplit,
    word_piece,
    words,
    characters,
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


def in_pieces(text: str, size: int) -> Callable[[], Iterator[str]]:
    return lambda: (text[i : i + size] for i in range(0, len(text), size))


def whole(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def check(tokenizer: Any, text: str, sizes: Sizes = SMALL) -> None:
    expected = whole(tokenizer, text)
    found = first_tokens(tokenizer, in_pieces(text, 97), None, None, None, sizes)
    assert list(found) == expected
    some = len(expected) // 3
    assert list(first_tokens(tokenizer, in_pieces(text, 1000), some, None, None, sizes)) == expected[:some]


LONG = {
    "prose": TEXT[40_000:60_000],
    "carriage returns": TEXT[:8000].replace("\n", "\r\n"),
    "no space": "".join(TEXT[:12_000].split()),
    "one letter": "a" * 3000 + " end",
    "one digit run": "x " * 300 + "1234567" * 700 + " and 12345 more " * 200,
    "digits": " ".join(str(7**n) for n in range(200)),
    "spaces": ("word" + " " * 700) * 8,
    "blank lines": ("word" + "\n" * 300 + "\t") * 12,
    "no space, punctuation": "第一章，第二節。" * 600,
    "other scripts": "यह एक परीक्षा है। これは試験です。هذا اختبار، نعم. Это проверка! " * 120,
    "combining": "e\u0301 a\u0308n\u0303 \u1e9b\u0323 " * 500,
    "emoji": "so 👩‍👩‍👧‍👦 it 🏳️‍🌈 goes 🇺🇳🇺🇳 " * 200,
    "special tokens": "one<s>two <s> three<unk>" * 300,
    "two phases": "abab" * 40 + " " + "ab" * 2000 + " ba" * 500,
    "code": "if(x[1]==y){return'z'}\n\tprint(\"don't\")\n\n" * 250,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LONG)
def test_the_tokens_of_the_whole_text(tokenizer: Any, kind: str) -> None:
    check(tokenizer, LONG[kind])


@pytest.mark.parametrize("text", ["", " ", "a", "two words", "\n\n", "x" * 255, "x " * 128])
def test_short_texts(tokenizer: Any, text: str) -> None:
    assert list(first_tokens(tokenizer, in_pieces(text, 7), None, None, None, SMALL)) == whole(tokenizer, text)


PARTS = (
    ["a", "the ", " of", "\n", "\r\n", "  ", "\t", "12", "3456", ",", ".\n", "'s", "don't", "é", "e\u0301", "中", "。"],
    [
        "ab",
        "ba",
        "👍🏽",
        "<s>",
        "<unk>",
        "print(",
        "__",
        "-",
        "\u00a0",
        "\u3000",
        "ß",
        "Σ",
        "\u200d",
        "ﬁ",
        "▁",
        "\ufeff",
    ],
)
PART = st.sampled_from([*PARTS[0], *PARTS[1]])


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.tuples(PART, st.integers(1, 60)), min_size=1, max_size=60), cut=st.integers(1, 300))
def test_any_text(tokenizer: Any, parts: list[tuple[str, int]], cut: int) -> None:
    text = "".join(part * times for part, times in parts)
    found = first_tokens(tokenizer, in_pieces(text, cut), None, None, None, SMALL)
    assert list(found) == whole(tokenizer, text)


class Slow:
    """A tokenizer in Python, which does not say where its tokens stand."""

    is_fast = False

    def __init__(self, inner: Any) -> None:
        self.inner, self.characters = inner, 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self.inner(text, **options)


@pytest.mark.slow
def test_tokenizers_without_offsets(tokenizer: Any) -> None:
    for kind in ("prose", "no space", "one digit run", "special tokens"):
        check(Slow(tokenizer), LONG[kind])
    slow = Slow(tokenizer)
    first_tokens(slow, in_pieces(TEXT, 1000), 100, None, None, SMALL)
    assert slow.characters < 8000


def test_only_what_is_wanted_is_read_and_tokenized() -> None:
    tokenizer, read = Slow(byte_level()), 0
    tokenizer.is_fast = True

    def pieces() -> Iterator[str]:
        nonlocal read
        for _ in range(1000):
            read += len(TEXT)
            yield TEXT

    counts: list[int] = []
    found = first_tokens(tokenizer, pieces, 50, None, counts.append)
    assert read == len(TEXT)
    assert tokenizer.characters < 40_000
    assert isinstance(found, array)
    assert len(found) == 50 <= counts[0]


def test_a_leading_bos_is_left_out() -> None:
    tokenizer = byte_level()
    for text in ("<s>one two", "<s><s>one two", "one two"):
        assert list(first_tokens(tokenizer, lambda text=text: [text], None, 0)) == whole(tokenizer, "one two")
    assert first_tokens(tokenizer, lambda: ["<s>one"])[0] == 0


def test_a_tokenizer_without_a_token_for_the_unknown() -> None:
    inner = Tokenizer(models.WordLevel({"one": 0}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(FewbitError, match="the model's tokenizer cannot encode the text: WordLevel error"):
        first_tokens(PreTrainedTokenizerFast(tokenizer_object=inner), lambda: ["one two"])
