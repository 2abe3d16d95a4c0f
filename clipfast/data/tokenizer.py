"""CLIP's byte-pair tokenizer, token for token that of OpenAI's CLIP and of open_clip's ``SimpleTokenizer``.

A text is cleaned and cut into words at blanks; a word is split into letters, digits and symbols, and each of
these pieces into tokens by CLIP's merges. Splitting and merging run in Rust (the `tokenizers` library), once
for every word: captions repeat their words, so their tokens are kept in a dictionary. On one core that is
several times faster than the library's own `encode_batch`, which spends most of its time on records that CLIP does
not need (offsets, token strings), and it starts no threads that a forked DataLoader worker would miss.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from itertools import chain
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

from clipfast.data.cleaning import clean_words
from clipfast.data.tokenizer_base import AnyTokenizer, checked_texts

CONTEXT_LENGTH = 77
SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")
_MERGES = 49152 - 256 - 2  # merges in use; the file holds more

# --- splitting: a word to pieces --------------------------------------------------------------------------

# Letters and numbers that entered Unicode with versions 17 and 18, after the tables of the Rust library's
# regular expressions (16). Python's `regex`, which open_clip splits with, knows them.
_NEW_LETTERS = (
    "558 58b-58c 88f c5c cdc 208f 209d-209f a7ce-a7cf a7d2 a7d4 a7dd a7e2 a7f1 ab6c-ab6d 107bb-107bf "
    "10940-10959 10ec5-10ec7 10ed9-10eee 11b0a 11db0-11ddb 11df1 16ea0-16eb8 16ebb-16ed3 16ff2-16ff3 "
    "187f8-187ff 18cd6-18cda 18d09-18d20 18d80-18df2 18e00-19191 191a0-191d2 1b123-1b128 1b168 1d6a6 "
    "1df1f-1df24 1df2b-1df81 1df90-1df96 1dfcd-1dfff 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 1e6e7-1e6ed "
    "1e6f0-1e6f4 1e6fe-1e6ff 2b73a-2b73f 2b81e 2cea2-2cead 323b0-33479 3d000-3fc3f"
)
_NEW_NUMBERS = "11de0-11de9 1246f 12475-1247f 12550-12686 16ff4-16ff6"


def _unicode_pattern() -> str:
    """CLIP's split as a regular expression for Rust, with what ``regex.IGNORECASE`` adds to it spelt out.

    Ignoring case makes the long s of "'ſ" an s, and makes U+0345, a mark whose upper case is a letter, match
    neither the letters nor the symbols: it is dropped.
    """

    def ranges(spans: str) -> str:
        return "".join("-".join(rf"\x{{{end}}}" for end in span.split("-")) for span in spans.split())

    letters = r"\p{L}" + ranges(_NEW_LETTERS)
    numbers = r"\p{N}" + ranges(_NEW_NUMBERS)
    specials = "<[sſ]tart_of_text>|<end_of_text>"
    return rf"{specials}|'(?:[sſtmd]|re|ve|ll)|[{letters}]+|[{numbers}]|[^\s{letters}{numbers}\x{{345}}]+"


# --- merging: a piece to tokens ---------------------------------------------------------------------------


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the order of CLIP's vocabulary."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The id of each token, and the merges, first merge first."""
    packed = (files("clipfast.data") / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : _MERGES + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    letters = list(_byte_alphabet().values())
    tokens = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), *SPECIAL_TOKENS]
    return {token: index for index, token in enumerate(tokens)}, merges


@cache
def _decoding_tables() -> tuple[list[str], dict[str, int]]:
    """The token of each id, and the byte of each of a token's characters."""
    return list(_vocabulary()[0]), {character: byte for byte, character in _byte_alphabet().items()}


class _TokensOfWord(dict[str, tuple[int, ...]]):
    """The token ids of every word met so far; Rust splits and merges a word when it is first asked for."""

    MAX_WORDS = 1 << 17  # about 30 MB
    MAX_LENGTH = 64  # characters; longer words are rarely met twice

    def __init__(self) -> None:
        super().__init__()
        vocab, merges = _vocabulary()
        split = Split(tokenizers.Regex(_unicode_pattern()), behavior="removed", invert=True)
        self._special = {token: (vocab[token],) for token in SPECIAL_TOKENS}
        self._bpe = BPE(vocab, merges, end_of_word_suffix="</w>")
        self._split = PreTokenizers([split, ByteLevel(add_prefix_space=False, use_regex=False)])

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids: list[int] = []
        for piece, _ in self._split.pre_tokenize_str(word):
            # a special token that a text spells out has an id but no merges leading to it
            ids += self._special.get(piece) or [token.id for token in self._bpe.tokenize(piece)]
        if len(word) <= self.MAX_LENGTH and len(self) < self.MAX_WORDS:
            self[word] = tuple(ids)
        return tuple(ids)


# --- the tokenizer ----------------------------------------------------------------------------------------


class Tokenizer(AnyTokenizer):
    """CLIP's tokenizer: texts to token ids `[B, context_length]`, int64.

    Gives the tokens of open_clip's ``SimpleTokenizer`` with its default cleaning (ftfy, HTML entities, white
    space, lower case). A row is SOT, the text's tokens, EOS, then zeros; of a text that is too long the tail is
    cut and EOS stays the last token. Safe to share between threads, to pickle, and to fork.

    Args:
        context_length: tokens in a row, SOT and EOS included; at least 2.
    """

    sot_id = 49406
    eos_id = 49407
    pad_id = 0
    vocab_size = 49408
    identity = "clip"

    def __init__(self, context_length: int = CONTEXT_LENGTH) -> None:
        self.context_length = _checked_length(context_length)
        self._tokens_of = _TokensOfWord()

    def __call__(self, texts: str | Iterable[str], context_length: int | None = None) -> torch.Tensor:
        """Token ids of a batch of texts, `[B, context_length]`, int64, on the CPU.

        Args:
            texts: one text (a batch of one) or several.
            context_length: tokens in a row, where other than the tokenizer's own.

        Raises:
            TypeError: `texts` is neither a str nor an iterable of str.
            ValueError: `context_length` has no room for SOT and EOS.
        """
        length = self.context_length if context_length is None else _checked_length(context_length)
        texts = checked_texts(texts)

        ids: list[int] = []  # of all texts, one after another
        counts: list[int] = []
        for text in texts:
            kept = self._ids(clean_words(text))[: length - 2]
            ids += kept
            counts.append(len(kept))

        tokens = np.zeros((len(texts), length), np.int64)
        ends = np.array(counts, np.int64) + 1
        tokens[:, 0] = self.sot_id
        tokens[:, 1:][np.arange(1, length) < ends[:, None]] = ids
        tokens[np.arange(len(texts)), ends] = self.eos_id
        return torch.from_numpy(tokens)

    def encode(self, text: str) -> list[int]:
        """The token ids of one text, without SOT, EOS, padding or truncation."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        return self._ids(clean_words(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids: lower case, a blank after every word; undecodable bytes become U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        tokens, byte_of = _decoding_tables()
        ids = [int(index) for index in ids]
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"ids must lie in [0, {self.vocab_size}), got {index}")
        text = bytes(byte_of[character] for index in ids for character in tokens[index])
        return text.decode("utf-8", errors="replace").replace("</w>", " ")

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        context_length: int | None = None,
        clean: str | None = None,
        pad_id: int | None = None,
        strip_sep_token: bool | None = None,
    ) -> AnyTokenizer:
        """Return the tokenizer of another model, from its file; it is called as this one is. Nothing is downloaded.

        A ``.model`` file gives SentencePiece's tokens, a ``tokenizer.json`` those of the tokenizers library. What else
        a model's own tokenizer does is read from the files beside it: ``tokenizer_config.json``,
        ``special_tokens_map.json`` and ``config.json`` as transformers reads them, ``open_clip_config.json`` as
        open_clip does. A file alone is taken for SigLIP's or SigLIP 2's where it has their special tokens; else a
        ``tokenizer.json`` does what it says, and of a ``.model`` nothing is guessed. ``repr`` says what came of it.

        Args:
            path: The file, or a folder with it, or the folder of a training run.
            context_length: Tokens in a row; by default what the files say, or SigLIP's 64.
            clean: What texts go through first, in the place of what the files say: ``"none"``; ``"whitespace"``,
                ``"lower"`` or ``"canonicalize"`` (open_clip's); ``"siglip"`` or ``"lowercase"`` (transformers' for
                SigLIP and SigLIP 2).
            pad_id: What fills a row, in the place of what the files say.
            strip_sep_token: Whether the separator becomes 0 in the end, as open_clip has it for CLIPA.

        Raises:
            FileNotFoundError: There is no such file, or none in the folder.
            ValueError: The file is damaged, or something that tokens depend on is said nowhere: the argument is named.
        """
        from clipfast.data.tokenizer_folder import read_tokenizer

        found = read_tokenizer(path, context_length, clean, pad_id, strip_sep_token)
        return cls(found) if isinstance(found, int) else found

    def _ids(self, words: list[str]) -> list[int]:
        return list(chain.from_iterable(map(self._tokens_of.__getitem__, words)))

    def __repr__(self) -> str:
        return f"Tokenizer(context_length={self.context_length})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.context_length,)


def _checked_length(context_length: int) -> int:
    if not isinstance(context_length, int) or isinstance(context_length, bool):
        raise TypeError(f"context_length must be an int, got {type(context_length).__name__}")
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2 (SOT and EOS), got {context_length}")
    return context_length


@cache
def _shared_tokenizer() -> Tokenizer:
    return Tokenizer()


def tokenize(texts: str | Iterable[str], context_length: int = CONTEXT_LENGTH) -> torch.Tensor:
    """Token ids `[B, context_length]`, int64, of one text or several, by a shared :class:`Tokenizer`."""
    return _shared_tokenizer()(texts, context_length)
