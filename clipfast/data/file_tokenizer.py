"""Tokenizers of other models than CLIP's, from a file that the user has: ``tokenizer.json``, or SentencePiece's.

What a file and those beside it say is found out once (:mod:`clipfast.data.tokenizer_folder`) and is a
:class:`TokenizerSettings` then. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import normalizers

from clipfast.data.cleaning import CLEANERS, without_surrogates
from clipfast.data.spm import Spm
from clipfast.data.spm_file import read_spm
from clipfast.data.spm_normalizer import SPACE
from clipfast.data.tokenizer_base import AnyTokenizer, checked_texts
from clipfast.files import write_atomically

SETTINGS_FILE = "clipfast_tokenizer.json"
# the first ids of XLM-RoBERTa's vocabulary, <s> <pad> </s> <unk>, stand before SentencePiece's pieces from 3 on
_FAIRSEQ_UNKNOWN, _FAIRSEQ_SHIFT, _FAIRSEQ_MORE = 3, 1, 2


@dataclass(frozen=True)
class TokenizerSettings:
    """What a tokenizer does beside its file.

    Attributes:
        clean: What texts go through first, in this order: names of :data:`clipfast.data.cleaning.CLEANERS`, or
            ``"lowercase"``.
        before, after: Ids that stand before and after a text's.
        pad_id: What fills a row.
        pad_left: Whether it fills it from the left.
        cut_left: Whether of a text that is too long the beginning is cut.
        zeroed_id: An id that becomes 0 in the end: open_clip's ``strip_sep_token``.
        fairseq_ids: Whether a ``.model``'s ids are XLM-RoBERTa's.
        spelled: Special tokens that count where a text spells them out, and their ids; of a ``.model``, for
            SentencePiece knows none.
    """

    clean: tuple[str, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    pad_id: int = 0
    pad_left: bool = False
    cut_left: bool = False
    zeroed_id: int | None = None
    fairseq_ids: bool = False
    spelled: tuple[tuple[str, int], ...] = ()


class FileTokenizer(AnyTokenizer):
    """A tokenizer from a file; see :meth:`clipfast.Tokenizer.from_file`. Safe to pickle and to fork.

    Attributes:
        settings: What is done beside the file.

    Args:
        data: The file.
        settings: What is done beside it.
        context_length: Tokens in a row, those of ``settings`` included.
        opened: What :func:`open_file` gives for the file, where it is there; it is changed.
    """

    def __init__(
        self,
        data: bytes,
        settings: TokenizerSettings,
        context_length: int,
        *,
        opened: Spm | tokenizers.Tokenizer | None = None,
    ) -> None:
        self._data, self.settings = data, settings
        self._limit: int | None = None
        model = open_file(data) if opened is None else opened
        if isinstance(model, Spm):
            self.vocab_size = len(model.file.pieces) + _FAIRSEQ_MORE * settings.fairseq_ids
            self._ids_of, self._text_of = _of_spm(model, settings)
        else:
            self.vocab_size = model.get_vocab_size()
            self._ids_of, self._text_of = _of_json(model, settings)
        self._cleaners = [CLEANERS[name] for name in settings.clean if name in CLEANERS]
        if "siglip" in settings.clean and isinstance(model, Spm):
            self._cleaners.remove(CLEANERS["siglip"])  # it is a part of what the model's own tokenizer does
        self.sot_id = settings.before[0] if settings.before else None
        self.eos_id = settings.after[-1] if settings.after else None
        self.pad_id = settings.pad_id
        if self.eos_id == settings.zeroed_id:
            self.eos_id = None
        for name, ids in (("before", settings.before), ("after", settings.after), ("pad_id", [settings.pad_id])):
            if any(not 0 <= index < self.vocab_size for index in ids):
                raise ValueError(f"{name}: got {list(ids)}, expected ids below {self.vocab_size}, the tokens there are")
        self.context_length = self._checked(context_length)

    def __call__(self, texts: str | Iterable[str], context_length: int | None = None) -> torch.Tensor:
        """Token ids of a batch of texts, ``[B, context_length]``, int64, on the CPU.

        Args:
            texts: One text (a batch of one) or several.
            context_length: Tokens in a row, where other than the tokenizer's own.

        Raises:
            TypeError: ``texts`` is neither a str nor an iterable of str.
            ValueError: ``context_length`` has no room for the special tokens, or a text has a token that the model
                lacks.
        """
        length = self.context_length if context_length is None else self._checked(context_length)
        settings = self.settings
        room = length - len(settings.before) - len(settings.after)
        texts = checked_texts(texts)
        tokens = np.full((len(texts), length), settings.pad_id, np.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = self._ids(text)
            if len(ids) > room:
                ids = ids[len(ids) - room :] if settings.cut_left else ids[:room]
            ids = [*settings.before, *ids, *settings.after]
            row[length - len(ids) if settings.pad_left else 0 :][: len(ids)] = ids
        if self._limit is not None and tokens.size and tokens.max() >= self._limit:
            row = int((tokens >= self._limit).any(axis=1).nonzero()[0][0])
            raise ValueError(
                f"texts[{row}]: got the token {tokens[row].max()}, expected one below {self._limit}, the model's "
                f"vocabulary: {texts[row]!r:.200}"
            )
        if settings.zeroed_id is not None:
            tokens[tokens == settings.zeroed_id] = 0
        return torch.from_numpy(tokens)

    def encode(self, text: str) -> list[int]:
        """The token ids of one text, without special tokens around it, padding or truncation."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        return self._ids(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, as the file's library puts it together.

        Raises:
            ValueError: An id outside the vocabulary.
        """
        ids = [int(index) for index in ids]
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"ids must lie in [0, {self.vocab_size}), got {index}")
        return self._text_of(ids)

    def fitted(self, context_length: int, vocab_size: int) -> FileTokenizer:
        """Return the same for a model of this context, which refuses tokens that are not in the model's vocabulary."""
        other = copy.copy(self)
        other.context_length, other._limit = self._checked(context_length), vocab_size
        return other

    @property
    def identity(self) -> str:
        """A SHA-256 of the file and the settings: what tokens depend on, beside the context's length."""
        settings = json.dumps(asdict(self.settings), sort_keys=True)
        return hashlib.sha256(hashlib.sha256(self._data).digest() + settings.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the file and the settings to a folder, for :meth:`clipfast.Tokenizer.from_file` to read."""
        name = "tokenizer.json" if is_json(self._data) else "tokenizer.model"
        facts = {"file": name, "context_length": self.context_length, "settings": asdict(self.settings)}
        text = json.dumps(facts, indent=1) + "\n"
        write_atomically(folder / name, lambda file: file.write(self._data))
        write_atomically(folder / SETTINGS_FILE, lambda file: file.write(text.encode()))

    def _ids(self, text: str) -> list[int]:
        text = without_surrogates(text)
        for cleaner in self._cleaners:
            text = cleaner(text)
        return self._ids_of(text)

    def _checked(self, context_length: int) -> int:
        if not isinstance(context_length, int) or isinstance(context_length, bool):
            raise TypeError(f"context_length must be an int, got {type(context_length).__name__}")
        least = max(1, len(self.settings.before) + len(self.settings.after))
        if context_length < least:
            raise ValueError(f"context_length must be at least {least}, got {context_length}")
        return context_length

    def __repr__(self) -> str:
        changed = {k: v for k, v in asdict(self.settings).items() if v != getattr(TokenizerSettings(), k)}
        words = "".join(f", {name}={value!r}" for name, value in changed.items())
        return f"FileTokenizer({self.vocab_size} tokens, context_length={self.context_length}{words})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (self._data, self.settings, self.context_length, self._limit)


def _remade(data: bytes, settings: TokenizerSettings, context_length: int, limit: int | None) -> FileTokenizer:
    tokenizer = FileTokenizer(data, settings, context_length)
    tokenizer._limit = limit
    return tokenizer


def is_json(data: bytes) -> bool:
    """Whether a tokenizer's file is JSON, and not SentencePiece's."""
    return data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def open_file(data: bytes) -> Spm | tokenizers.Tokenizer:
    """Open the bytes of a ``tokenizer.json`` or of a SentencePiece model.

    Raises:
        ValueError: They are neither, or damaged.
    """
    if not is_json(data):
        return Spm(read_spm(data))
    try:
        model = tokenizers.Tokenizer.from_str(data.decode("utf-8-sig"))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"got JSON that is no tokenizer of the tokenizers library: {error}") from error
    return model


# --- texts to ids, and back -------------------------------------------------------------------------------

_Encode, _Decode = Callable[[str], list[int]], Callable[[list[int]], str]


def _of_json(model: tokenizers.Tokenizer, settings: TokenizerSettings) -> tuple[_Encode, _Decode]:
    model.no_truncation()
    model.no_padding()
    if "lowercase" in settings.clean:
        # behind the special tokens that a text spells out, as in transformers' Siglip2Tokenizer
        own = [] if model.normalizer is None else [model.normalizer]
        model.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])

    def encode(text: str) -> list[int]:
        # one by one: a batch starts threads, which a forked DataLoader worker would miss
        return model.encode(text, add_special_tokens=False).ids

    return encode, lambda ids: model.decode(ids, skip_special_tokens=False)


def _of_spm(model: Spm, settings: TokenizerSettings) -> tuple[_Encode, _Decode]:
    encode = _as_siglip(model) if "siglip" in settings.clean else model.encode
    if "lowercase" in settings.clean:
        lower, plain = normalizers.Lowercase().normalize_str, encode

        def encode(text: str) -> list[int]:
            return plain(lower(text))

    decode = model.decode
    if settings.fairseq_ids:
        encode, decode = _as_fairseq(model, encode)
    if settings.spelled:
        encode = _around_specials(dict(settings.spelled), encode)
    return encode, decode


def _around_specials(specials: dict[str, int], encode: _Encode) -> _Encode:
    """Return what cuts a text at special tokens that it spells out, and what is between them by itself."""
    split = _splitter(specials)

    def whole(text: str) -> list[int]:
        parts = split(text)
        if len(parts) == 1:
            return encode(text)
        return [i for n, part in enumerate(parts) for i in ([specials[part]] if n % 2 else encode(part))]

    return whole


def _splitter(specials: Iterable[str]) -> Callable[[str], list[str]]:
    return re.compile("(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")").split


def _as_fairseq(model: Spm, encode: _Encode) -> tuple[_Encode, _Decode]:
    unknown, own = model.file.unk_id, encode
    back = {0: "<s>", 1: "<pad>", 2: "</s>", len(model.file.pieces) + 1: "<mask>"}

    def shifted(text: str) -> list[int]:
        return [_FAIRSEQ_UNKNOWN if index == unknown else index + _FAIRSEQ_SHIFT for index in own(text)]

    def decode(ids: list[int]) -> str:
        plain = [i - _FAIRSEQ_SHIFT if i > _FAIRSEQ_UNKNOWN else unknown for i in ids if i not in back]
        return model.decode(plain)

    return shifted, decode


def _as_siglip(model: Spm) -> _Encode:
    """Return what transformers' ``SiglipTokenizer`` does around SentencePiece.

    Special tokens that a text spells out count, without the blanks around them. What is between them is cleaned, and
    segmented behind ``<unk>``; the text's own ``▁`` are blanks, and one is put before it.
    """
    pieces, unknown, clean = model.file.pieces, model.file.unk_id, CLEANERS["siglip"]
    specials = {pieces[index].text: index for index in (model.file.eos_id, unknown) if index is not None}
    split = _splitter(specials)
    prefix = pieces[unknown].text
    skipped = len(model.encode(prefix))
    blank = next((index for index, piece in enumerate(pieces) if piece.text == SPACE), unknown)

    def encode(text: str) -> list[int]:
        parts = split(SPACE + text.replace(SPACE, " "))
        ids: list[int] = []
        for place, part in enumerate(parts):
            if place % 2:
                ids.append(specials[part])
                continue
            part = part.lstrip() if place else part
            part = part.rstrip() if place < len(parts) - 1 else part
            if part:
                found = model.encode(prefix + clean(part))
                ids += found[skipped:] if len(found) >= skipped else found
            if place == 0 and len(parts) > 1 and ids == [blank]:
                ids = []  # nothing but the blank that was put before a special token
        return ids

    return encode
