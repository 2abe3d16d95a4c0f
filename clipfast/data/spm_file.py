"""What a SentencePiece ``.model`` file says: its pieces, its special tokens, and how texts are normalised.

The file is a Protocol Buffers message, ``ModelProto`` of ``sentencepiece_model.proto`` (Kudo and Richardson, 2018). Of
the wire format only what such files use is read here, so that no library is needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
_MODEL_TYPES = {3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    """A token: its text, its score (a float32), and its kind, such as ``NORMAL``."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SpmFile:
    """A SentencePiece model.

    Attributes:
        pieces: By id.
        model_type: ``UNIGRAM`` or ``BPE``.
        byte_fallback: Whether what no piece covers becomes the pieces of its bytes.
        unk_id: Of what no piece covers.
        sot_id, eos_id, pad_id: Of the file's own special tokens; None where it has none.
        charsmap: The compiled replacements of characters, see :class:`clipfast.data.spm_normalizer.Normalizer`.
        add_dummy_prefix: Whether a text gets a blank before it.
        remove_extra_whitespaces: Whether blanks at the ends are removed, and those within become one.
        whitespace_as_suffix: Whether a word's blank is behind it.
    """

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    unk_id: int
    sot_id: int | None
    eos_id: int | None
    pad_id: int | None
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    whitespace_as_suffix: bool


def read_spm(data: bytes) -> SpmFile:
    """Read a SentencePiece model.

    Raises:
        ValueError: The bytes are no whole model, or one of a type that is not served.
    """
    try:
        return _read(data)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"got no whole SentencePiece model: {error}") from error


def _read(data: bytes) -> SpmFile:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_piece(value))
        elif field == 2:
            trainer |= dict(_fields(value))
        elif field == 3:
            normalizer |= dict(_fields(value))
    unknown = [index for index, piece in enumerate(pieces) if piece.kind == UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"got {len(pieces)} pieces of which {len(unknown)} are <unk>, expected one")
    model_type = trainer.get(3, UNIGRAM)
    if model_type not in (UNIGRAM, BPE):
        raise ValueError(f"got a model of type {_MODEL_TYPES.get(model_type, model_type)}, expected unigram or bpe")
    if not normalizer.get(5, 1):
        raise ValueError("got a model with escape_whitespaces = false, expected true")
    ids = {piece.text: index for index, piece in enumerate(pieces) if piece.kind == CONTROL}

    def special(own_id: int, own_text: int, usual: str) -> int | None:
        if own_id in trainer and _signed(trainer[own_id]) < 0:
            return None
        return ids.get(bytes(trainer.get(own_text, usual.encode())).decode())

    return SpmFile(
        tuple(pieces),
        model_type,
        bool(trainer.get(35, 0)),
        unknown[0],
        special(41, 46, "<s>"),
        special(42, 47, "</s>"),
        special(43, 48, "<pad>"),
        bytes(normalizer.get(2, b"")),
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
        bool(trainer.get(24, 0)),
    )


def _piece(data: bytes) -> Piece:
    values = dict(_fields(data))
    score = struct.unpack("<f", values.get(2, bytes(4)))[0]
    return Piece(bytes(values.get(1, b"")).decode(), score, values.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and value of each field of a message: integers, or the bytes of anything else."""
    if not isinstance(data, bytes):
        raise ValueError(f"got no SentencePiece model: a number {data} where a message was expected")
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield field, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"got no SentencePiece model: wire type {kind} at byte {place}")
        if place + size > len(data):
            raise ValueError(f"got no whole SentencePiece model: a field of {size} bytes begins at byte {place}")
        yield field, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError(f"got no SentencePiece model: a number of more than ten bytes before byte {place}")


def _signed(value: int | bytes) -> int:
    return value - (1 << 64) if isinstance(value, int) and value >= 1 << 63 else int(value)
