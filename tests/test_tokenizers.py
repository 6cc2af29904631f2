"""Tokenizers: our fast paths against the library, damage, printing and streaming."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers

from moesaic.data.tokenizers import StreamDecoder, Tokenizer
from moesaic.errors import DataError

TEXT = "First line,\r\n\n  second: naïve café — 漢字 😀👩\u200d🚀\ttab\x00 end"
EMOJI = "😀"


def char() -> Tokenizer:
    return Tokenizer.char([TEXT])


def bpe() -> Tokenizer:
    return Tokenizer.bpe([TEXT, "the cat and the hat and the bat " * 20], 300)


def metaspace() -> Tokenizer:
    """A tokenizer of the sentencepiece family: its decoder looks at neighbours."""
    words = ["▁the", "▁cat", "s", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "</s>", "<unk>"]
    model = library.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(["</s>"])
    return Tokenizer(model)


def test_char_vocabulary_is_the_sorted_distinct_characters() -> None:
    tokenizer = Tokenizer.char(["hello\n", "café"])
    assert tokenizer.kind == "char"
    assert tokenizer.vocab_size == len(set("hello\ncafé"))
    assert tokenizer.eos_id is None
    assert tokenizer.encode("\né").tolist() == [0, tokenizer.vocab_size - 1]
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.encode("hello").dtype == np.int32


def test_byte_ids_are_the_utf8_bytes() -> None:
    tokenizer = Tokenizer.byte()
    assert tokenizer.kind == "byte"
    assert tokenizer.vocab_size == 256
    assert tokenizer.eos_id is None
    assert bytes(tokenizer.encode(TEXT).tolist()) == TEXT.encode()


@pytest.mark.parametrize("make", [char, Tokenizer.byte, bpe], ids=["char", "byte", "bpe"])
def test_saved_file_is_read_and_agreed_with_by_the_library(make, tmp_path: Path) -> None:
    ours = make()
    ours.save(tmp_path / "deep" / "tokenizer.json")
    theirs = library.Tokenizer.from_file(str(tmp_path / "deep" / "tokenizer.json"))
    assert ours.encode(TEXT).tolist() == theirs.encode(TEXT).ids
    assert ours.decode(ours.encode(TEXT)) == TEXT == theirs.decode(theirs.encode(TEXT).ids)
    again = Tokenizer.load(tmp_path / "deep")
    assert (again.kind, again.vocab_size, again.eos_id) == (ours.kind, ours.vocab_size, ours.eos_id)
    assert again.fingerprint == ours.fingerprint
    assert again.encode(TEXT).tolist() == ours.encode(TEXT).tolist()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["tokenizer.json"]


def test_bpe_training_is_deterministic_and_has_an_end_token() -> None:
    first, second = bpe(), bpe()
    assert first.fingerprint == second.fingerprint
    assert first.kind == "bpe"
    assert first.eos_id == 0
    assert len(first.encode("the cat and the hat")) < len("the cat and the hat")
    assert Tokenizer.bpe(["a b a b"], 260, special=("<stop>",)).eos_id == 0
    assert Tokenizer.bpe(["a b a b"], 260, special=("<one>", "<two>")).eos_id is None
    assert first.fingerprint != Tokenizer.bpe(["other words"], 300).fingerprint


def test_bpe_needs_room_for_the_bytes() -> None:
    with pytest.raises(DataError, match=r"vocab_size=256 is too small.*at least 257"):
        Tokenizer.bpe(["abc"], 256)


def test_unknown_character_is_named_with_its_position() -> None:
    with pytest.raises(DataError, match=r"'z' \(U\+007A\) at position 3 .* 3 characters"):
        Tokenizer.char(["abc"]).encode("abcz")
    with pytest.raises(DataError, match=r"U\+1F600\) at position 0"):
        Tokenizer.char(["abc"]).encode(EMOJI)


@pytest.mark.parametrize("make", [char, Tokenizer.byte, bpe], ids=["char", "byte", "bpe"])
def test_lone_surrogate_is_a_data_error(make) -> None:
    with pytest.raises(DataError):
        make().encode("a\ud800")


@pytest.mark.parametrize("texts", [[], [""], ["a\udfff"]])
def test_char_vocabulary_of_nothing_or_of_surrogates(texts: list[str]) -> None:
    with pytest.raises(DataError):
        Tokenizer.char(texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "damaged"), (b"[]", "damaged"), (b'{"a": 1}', "damaged"), (b"\xff", "byte 0"), (b"", "damaged")],
)
def test_damaged_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer file"):
        Tokenizer.load(tmp_path / "nothing.json")


def test_truncation_and_padding_in_a_file_do_not_cut_documents(tmp_path: Path) -> None:
    inner = bpe().library
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert json.loads(tokenizer.library.to_str())["truncation"] is None


def test_other_tokenizers_keep_their_kind(tmp_path: Path) -> None:
    words = library.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert tokenizer.kind == "other"
    assert tokenizer.encode("a b z").tolist() == [0, 1, 2]
    assert metaspace().eos_id == 7


def test_decode_drops_special_and_unknown_ids_and_refuses_negative_ones() -> None:
    tokenizer = bpe()
    ids = tokenizer.encode("ab<|endoftext|>c").tolist()
    assert 0 in ids
    assert tokenizer.decode([*ids, 10_000]) == "abc"
    with pytest.raises(DataError, match="-1 is no token id"):
        tokenizer.decode([-1])


def test_token_text_can_be_printed_in_a_table() -> None:
    tokenizer = Tokenizer.char(["a\n \x1b\u202e\u00a0\U000e0041"])
    shown = {tokenizer.library.id_to_token(i): tokenizer.token_text(i) for i in range(tokenizer.vocab_size)}
    assert shown == {
        "a": "a",
        "\n": "⏎",
        " ": " ",
        "\x1b": "\\x1b",
        "\u202e": "\\u202e",
        "\u00a0": "\\xa0",
        "\U000e0041": "\\U000e0041",
    }
    assert Tokenizer.byte().token_text(0xF0) == "\\xf0"
    assert Tokenizer.byte().token_text(10) == "⏎"
    assert bpe().token_text(0) == "<|endoftext|>"
    assert bpe().token_text(99_999) == "<id 99999>"
    assert metaspace().token_text(0) == " the"


def test_byte_length_counts_the_text_and_not_the_special_tokens() -> None:
    for tokenizer in (char(), Tokenizer.byte(), bpe()):
        assert tokenizer.byte_length(tokenizer.encode(TEXT)) == len(TEXT.encode())
    assert bpe().byte_length([0]) == 0
    assert metaspace().byte_length([0, 1]) == len("the cat")


def test_stream_holds_back_half_an_emoji() -> None:
    decoder = StreamDecoder(Tokenizer.byte())
    assert [decoder.push(byte) for byte in EMOJI.encode()] == ["", "", "", EMOJI]
    assert decoder.flush() == ""
    assert decoder.push(0xF0) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ord("a")) == "a"


def test_stream_of_a_tokenizer_with_byte_fallback() -> None:
    decoder = StreamDecoder(metaspace())
    assert [decoder.push(i) for i in (0, 1, 2, 3, 4, 5, 6, 7)] == ["the", " cat", "s", "", "", "", EMOJI, ""]
    assert decoder.flush() == ""


@pytest.mark.parametrize("make", [char, Tokenizer.byte, bpe, metaspace], ids=["char", "byte", "bpe", "other"])
def test_stream_equals_decode_of_any_ids(make) -> None:
    tokenizer, draw = make(), random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(tokenizer.vocab_size + 1) for _ in range(12)]
        decoder = StreamDecoder(tokenizer)
        assert "".join(decoder.push(i) for i in ids) + decoder.flush() == tokenizer.decode(ids)


def test_stream_agrees_on_added_tokens() -> None:
    tokenizer = bpe()
    tokenizer.library.add_tokens(["<tool>", "汉 x"])
    tokenizer = Tokenizer(tokenizer.library)
    ids = tokenizer.encode("a<tool>b汉 x c").tolist()
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == tokenizer.decode(ids)
    assert tokenizer.token_text(tokenizer.vocab_size - 1) == "汉 x"
