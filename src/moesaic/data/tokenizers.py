"""Text to token ids and back: characters, bytes, byte-level BPE, or any ``tokenizer.json``.

Every tokenizer is a ``tokenizers.Tokenizer`` of Hugging Face's library inside, so what is saved is a
standard ``tokenizer.json``. Characters and bytes also have a numpy path, because the library needs
seconds for a text that a table look-up encodes in milliseconds; the two agree id for id.
"""

import codecs
import hashlib
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from moesaic.errors import DataError

Kind = Literal["char", "byte", "bpe", "other"]
Ids = Sequence[int] | NDArray[np.integer[Any]]

# A tokenizer.json does not say which special token ends a document; these are the names in use.
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>")

# "." leaves newlines out.
_ANY_CHARACTER = r"[\s\S]"


def _byte_characters() -> tuple[str, ...]:
    """The character by which byte-level BPE writes each byte: itself where it is visible."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    invisible = [byte for byte in range(256) if byte not in visible]
    return tuple(chr(b) if b in visible else chr(256 + invisible.index(b)) for b in range(256))


_CHARACTER_OF_BYTE = _byte_characters()
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(_CHARACTER_OF_BYTE)}


class Tokenizer:
    """A ``tokenizers.Tokenizer`` that knows its kind, its end-of-document token and its fingerprint."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        # A truncation or padding that a file carries would silently cut or fill documents.
        library.no_truncation()
        library.no_padding()
        self.library = library
        self.spec: dict[str, Any] = json.loads(library.to_str())  # the content of tokenizer.json
        self.kind: Kind = _kind(self.spec)
        vocabulary = library.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        special = [t["content"] for t in self.spec["added_tokens"] if t["special"]]
        names = [name for name in EOS_NAMES if name in special] or (special if len(special) == 1 else [])
        self.eos_id: int | None = vocabulary[names[0]] if names else None

    @classmethod
    def char(cls, texts: Iterable[str]) -> "Tokenizer":
        """One token per character; the vocabulary is the sorted distinct characters of ``texts``."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text)
        if not seen:
            raise DataError("a character vocabulary needs text, and the text given is empty")
        characters = sorted(seen)
        if any("\ud800" <= character <= "\udfff" for character in characters):
            raise DataError("the text holds a lone surrogate, which is no character; mend it in its source")
        library = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, "<unk>"))
        library.pre_tokenizer = pre_tokenizers.Split(Regex(_ANY_CHARACTER), "isolated")
        library.decoder = decoders.Fuse()
        return cls(library)

    @classmethod
    def byte(cls) -> "Tokenizer":
        """256 tokens: the bytes of the UTF-8 text, each with its value as id."""
        library = tokenizers.Tokenizer(models.BPE(vocab=dict(_BYTE_OF_CHARACTER), merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        return cls(library)

    @classmethod
    def bpe(
        cls, texts: Iterable[str], vocab_size: int, special: Sequence[str] = ("<|endoftext|>",)
    ) -> "Tokenizer":
        """Byte-level BPE (Radford et al., 2019) trained on ``texts``; the same texts give the same merges.

        The special tokens take the first ids; the one named in ``EOS_NAMES``, or a single one of any
        name, ends documents. The vocabulary is smaller than ``vocab_size`` when the text runs out of
        pairs to merge. Raises DataError when the 256 bytes and the special tokens do not fit.
        """
        least = 256 + len(special)
        if vocab_size < least:
            raise DataError(
                f"data.vocab_size={vocab_size} is too small for BPE: 256 bytes and {len(special)} special "
                f"tokens need at least {least}"
            )
        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special),
            initial_alphabet=sorted(_CHARACTER_OF_BYTE),
            show_progress=False,
        )
        try:
            library.train_from_iterator(texts, trainer)
        except TypeError:
            raise DataError("the text holds a lone surrogate, which is no character") from None
        return cls(library)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read any ``tokenizer.json``, or the one inside a model directory. Raises DataError on damage."""
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{file}: no such tokenizer file") from None
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
        return cls.parse(data, str(file))

    @classmethod
    def parse(cls, data: bytes, where: str) -> "Tokenizer":
        """The tokenizer that a ``tokenizer.json`` of this content is. Raises DataError, which names
        ``where``."""
        try:
            return cls(tokenizers.Tokenizer.from_str(data.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not a tokenizer.json: not UTF-8 text (byte {error.start})") from None
        except Exception as error:  # the library raises nothing more precise
            raise DataError(f"{where}: not a tokenizer.json, or damaged: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a standard ``tokenizer.json``; a reader sees the old file or the new one, never a part."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as out:
                out.write(self.library.to_str(pretty=True))
                out.flush()
                os.fsync(out.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON: equal exactly when two tokenizers are the same."""
        canonical = json.dumps(self.spec, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.int32]:
        """The ids of ``text``, int32 [T]; special tokens written in the text become their ids. None is added
        but, if ``special``, those with which the tokenizer has every text begin or end.

        Raises DataError for a character outside a character vocabulary, naming it and its position.
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[NDArray[np.int32]]:
        """``encode`` of each text; the library spreads these over its threads."""
        if self.kind == "char":
            return [self._encode_characters(text) for text in texts]
        try:
            if self.kind == "byte":
                return [np.frombuffer(t.encode("utf-8"), np.uint8).astype(np.int32) for t in texts]
            encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=special)
        except (UnicodeEncodeError, TypeError):
            raise DataError("the text holds a lone surrogate, which is no character") from None
        except Exception as error:  # the library raises nothing more precise
            raise DataError(f"the tokenizer cannot encode this text: {error}") from None
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def encode_placed(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ids of ``text`` and the character at which each begins, [T] both. Raises as ``encode``."""
        if self.kind == "char":
            ids = self._encode_characters(text)
            return ids, np.arange(len(ids))
        if self.kind == "byte":
            sizes = [len(character.encode("utf-8")) for character in text]
            return self.encode(text), np.repeat(np.arange(len(text)), sizes)
        try:
            coded = self.library.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises nothing more precise
            raise DataError(f"the tokenizer cannot encode this text: {error}") from None
        begins = np.array([begin for begin, _ in coded.offsets], dtype=np.int64)
        return np.array(coded.ids, dtype=np.int32), begins

    def _encode_characters(self, text: str) -> NDArray[np.int32]:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))
        ids: NDArray[np.int32] = self._id_of_code[np.minimum(codes, len(self._id_of_code) - 1)]
        unknown = ids < 0
        if unknown.any():
            position = int(unknown.argmax())
            raise DataError(
                f"character {text[position]!r} (U+{int(codes[position]):04X}) at position {position} is not "
                f"among the {self.vocab_size} characters of this tokenizer; leave it out, or train with "
                f"data.tokenizer=byte"
            )
        return ids

    @cached_property
    def _id_of_code(self) -> NDArray[np.int32]:
        vocabulary: dict[str, int] = self.spec["model"]["vocab"]
        codes = [ord(character) for character in vocabulary]
        table = np.full(max(codes) + 2, -1, np.int32)  # the last entry stands for every code above
        table[codes] = list(vocabulary.values())
        return table

    def decode(self, ids: Ids) -> str:
        """The text of ``ids``; special tokens and ids without a token (a padded vocabulary) give none.

        Bytes that form no character give U+FFFD. Raises DataError for a negative id.
        """
        plain = [int(i) for i in ids]
        if plain and min(plain) < 0:
            raise DataError(f"{min(plain)} is no token id: ids start at 0")
        return str(self.library.decode(plain, skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """One token as it can be printed in a table: a newline as ⏎, what is invisible escaped."""
        token = self.library.id_to_token(token_id)
        if token is None:
            return f"<id {token_id}>"
        if self.kind in ("byte", "bpe") and token_id not in self._added:
            token = _token_bytes(token).decode("utf-8", "backslashreplace")
        if self.kind == "other":
            token = token.replace("▁", " ")  # how the sentencepiece family writes a space
        return "".join(_printable(character) for character in token)

    def byte_length(self, ids: Ids) -> int:
        """How many UTF-8 bytes of text ``ids`` stand for; special tokens count nothing."""
        if self.kind == "other":
            return len(self.decode(ids).encode("utf-8"))
        lengths = np.array([len(token) for token in self.token_bytes], np.int64)
        return int(lengths[np.asarray(ids, np.int64)].sum())

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes each id adds to the decoded text (kinds char, byte and bpe): [vocab_size]."""
        table = [b""] * self.vocab_size
        for token, token_id in self.library.get_vocab(with_added_tokens=True).items():
            if not self._added.get(token_id, False):
                table[token_id] = token.encode("utf-8") if self.kind == "char" else _token_bytes(token)
        return table

    @cached_property
    def _added(self) -> dict[int, bool]:
        """Id of every added token, and whether it is special."""
        return {token["id"]: token["special"] for token in self.spec["added_tokens"]}


class StreamDecoder:
    """Text from ids that arrive one by one, never half a character.

    All that ``push`` returned, and ``flush`` at the end, is exactly ``decode`` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._given = ""

    def push(self, token_id: int) -> str:
        """The text that is certain once this id is known; often empty inside a character."""
        if self._tokenizer.kind != "other":
            table = self._tokenizer.token_bytes
            if token_id < 0:
                raise DataError(f"{token_id} is no token id: ids start at 0")
            return self._utf8.decode(table[token_id] if token_id < len(table) else b"")
        # Decoders of other tokenizers look at their neighbours, so all ids are decoded each time.
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") or not text.startswith(self._given):
            return ""
        new = text[len(self._given) :]
        self._given = text
        return new

    def flush(self) -> str:
        """What was still held back; the decoder then starts afresh."""
        if self._tokenizer.kind != "other":
            rest = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return rest
        text = self._tokenizer.decode(self._ids)
        rest = text[len(self._given) :]
        self._ids, self._given = [], ""
        return rest


def characters_of_bytes(data: bytes) -> str:
    """Bytes as byte-level BPE writes them, a character each."""
    return "".join(_CHARACTER_OF_BYTE[byte] for byte in data)


def _kind(spec: dict[str, Any]) -> Kind:
    model, pre, decoder = spec["model"], spec["pre_tokenizer"] or {}, spec["decoder"] or {}
    plain = not (spec["normalizer"] or spec["post_processor"] or spec["added_tokens"])
    if model["type"] == "WordLevel":
        vocabulary: dict[str, int] = model["vocab"]
        every_character = {
            "type": "Split",
            "pattern": {"Regex": _ANY_CHARACTER},
            "behavior": "Isolated",
            "invert": False,
        }
        whole = sorted(vocabulary.values()) == list(range(len(vocabulary))) and bool(vocabulary)
        single = whole and all(len(token) == 1 for token in vocabulary)
        fuse = decoder.get("type") == "Fuse"
        return "char" if plain and single and fuse and pre == every_character else "other"
    if model["type"] == "BPE" and decoder.get("type") == "ByteLevel":
        bytes_only = not model["merges"] and model["vocab"] == _BYTE_OF_CHARACTER
        as_is = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space")
        return "byte" if plain and bytes_only and as_is else "bpe"
    return "other"


def _token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; a token with any other character stands for itself."""
    if all(character in _BYTE_OF_CHARACTER for character in token):
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    return token.encode("utf-8")


def _printable(character: str) -> str:
    if character == "\n":
        return "⏎"
    category = unicodedata.category(character)
    if character == " " or category[0] not in "CZ":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
