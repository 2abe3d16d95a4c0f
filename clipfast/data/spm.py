"""SentencePiece's tokens, exactly: unigram and BPE models as the library segments, from a ``.model`` file alone.

A text is normalised and cut at ``▁`` into words, and a word into pieces; captions repeat their words, so their pieces
are kept in a dictionary. That is several times faster than segmenting every text anew.

The library adds up a unigram model's scores in float32, over the whole text. Where two ways to cut a word are so close
that rounding could choose between them, they are added up in the same way here; elsewhere a word's pieces do not depend
on what stands before it. (The `tokenizers` library adds up in float64, word by word, and differs now and then.)

Methods: Kudo, 2018 (unigram); Sennrich et al., 2016 (BPE).
"""

from __future__ import annotations

import heapq
import re
import struct
from collections.abc import Iterable
from itertools import groupby
from math import inf
from typing import NamedTuple

from clipfast.data.spm_file import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SpmFile
from clipfast.data.spm_normalizer import SPACE, Normalizer

_UNKNOWN_PENALTY = 10.0
_LARGEST, _SMALLEST = 3.4028234663852886e38, 1.1754943508222875e-38  # of float32
_float = struct.Struct("f")


def _float32(value: float) -> float:
    return _float.unpack(_float.pack(value))[0]


class _Word(NamedTuple):
    """How a word is cut.

    Attributes:
        ids: Of its pieces.
        scores: What each step of the best way adds; empty for BPE.
        margin: By how much that way is better than the next at any place on it.
    """

    ids: tuple[int, ...]
    scores: tuple[float, ...] = ()
    margin: float = inf


class Spm:
    """The ids of texts, without special tokens, as SentencePiece gives them.

    Args:
        file: The model.
    """

    MAX_WORDS = 1 << 17
    MAX_LENGTH = 64  # characters; longer words are rarely met twice

    def __init__(self, file: SpmFile) -> None:
        self.file = file
        self._normalize = Normalizer(file)
        pieces = file.pieces
        self._bytes = {piece.text: index for index, piece in enumerate(pieces) if piece.kind == BYTE}
        # an unused piece is a step of BPE's, but none of its results
        kinds = (NORMAL, USER_DEFINED, UNUSED) if file.model_type == BPE else (NORMAL, USER_DEFINED)
        self._ids = {piece.text: index for index, piece in enumerate(pieces) if piece.kind in kinds}
        self._longest = max(map(len, self._ids), default=1)
        symbols = sorted((piece.text for piece in pieces if piece.kind == USER_DEFINED), key=len, reverse=True)
        self._symbol = re.compile("|".join(map(re.escape, symbols))).match if symbols else None
        usual = [piece.score for piece in pieces if piece.kind == NORMAL]
        least, most = min([*usual, _LARGEST]), max([*usual, _SMALLEST])
        # a symbol of the user's goes before everything else
        self._scores = [
            _float32(len(piece.text.encode()) * most) - 0.1 if piece.kind == USER_DEFINED else piece.score
            for piece in pieces
        ]
        self._unknown_score = _float32(least - _UNKNOWN_PENALTY)
        # words can be cut by themselves where no piece reaches from one into the next
        crossing = any(SPACE in text.lstrip(SPACE) for text in self._ids)
        self._cut = None if crossing else re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+").findall
        self._words: dict[str, _Word] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Lone surrogates must have been replaced."""
        text = self._normalize(text)
        words = self._cut(text) if self._cut is not None else [text] if text else []
        known = self._words
        cut = [known.get(word) or self._look_up(word) for word in words]
        if any(word.margin < inf for word in cut):
            cut = self._certain(words, cut)
        ids = [index for word in cut for index in word.ids]
        unknown = self.file.unk_id
        if not self.file.byte_fallback and ids.count(unknown) > 1:  # neighbours are one
            ids = [index for place, index in enumerate(ids) if index != unknown or ids[place - 1 : place] != [unknown]]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids in the vocabulary: nothing for control tokens, `` ⁇ `` for what was unknown."""
        file, text, at_start = self.file, "", True
        for kind, group in groupby(ids, lambda index: file.pieces[index].kind):
            if kind == BYTE:
                data = bytes(int(file.pieces[index].text[3:5], 16) for index in group)
                # U+FFFD for each byte that is no part of a character
                text += re.sub("[\udc80-\udcff]", "\ufffd", data.decode(errors="surrogateescape"))
                continue
            for index in group:
                piece = file.pieces[index].text
                if kind == CONTROL:
                    piece = ""
                elif kind == UNKNOWN:
                    piece = " ⁇ "
                elif at_start and not text and (file.add_dummy_prefix or file.remove_extra_whitespaces):
                    # the blank that was put before the text
                    at_start = not piece.startswith(SPACE) or file.remove_extra_whitespaces
                    piece = piece.removeprefix(SPACE)
                text += piece.replace(SPACE, " ")
        return text

    def _look_up(self, word: str) -> _Word:
        cut = _Word(self._merged(word)) if self.file.model_type == BPE else self._best(word)
        if len(word) <= self.MAX_LENGTH and len(self._words) < self.MAX_WORDS:
            self._words[word] = cut
        return cut

    def _of_unknown(self, text: str) -> list[int]:
        unknown = self.file.unk_id
        if not self.file.byte_fallback:
            return [unknown]
        return [self._bytes.get(f"<0x{byte:02X}>", unknown) for byte in text.encode()]

    # --- unigram ------------------------------------------------------------------------------------------

    def _best(self, word: str, before: float | None = None) -> _Word:
        """Cut a word in the way whose scores add up to most (Viterbi).

        Args:
            word: It.
            before: The sum for what stands before it; sums are rounded to float32 then, as SentencePiece does.
        """
        ids, scores, size = self._ids, self._scores, len(word)
        best = [before or 0.0] + [-inf] * size  # the best sum for what ends at each place,
        margin = [inf] * (size + 1)  # by how much it is the best,
        step = [(0, -1, 0.0)] * (size + 1)  # and its last step: where it begins, its id and score
        for start in range(size):
            so_far, single = best[start], False
            steps = []
            for end in range(start + 1, min(size, start + self._longest) + 1):
                index = ids.get(word[start:end])
                if index is not None:
                    steps.append((end, index, scores[index]))
                    single = single or end == start + 1
            if not single:
                # unknown characters come in at the end there, too: of equal ways the first counts
                steps.append((start + 1, -1, self._unknown_score))
            for end, index, score in steps:
                total = so_far + score if before is None else _float32(so_far + score)
                if total > best[end]:
                    margin[end] = total - best[end]
                    best[end] = total
                    step[end] = (start, index, score)
                else:
                    margin[end] = min(margin[end], best[end] - total)
        found: list[list[int]] = []
        taken: list[float] = []
        end, least = size, inf
        while end:
            start, index, score = step[end]
            least = min(least, margin[end])
            found.append([index] if index >= 0 else self._of_unknown(word[start:end]))
            taken.append(score)
            end = start
        return _Word(tuple(i for part in reversed(found) for i in part), tuple(reversed(taken)), least)

    def _certain(self, words: list[str], cut: list[_Word]) -> list[_Word]:
        """Cut those words anew for which rounding may choose another way."""
        total, uncertain = 0.0, []
        for place, (text, word) in enumerate(zip(words, cut, strict=True)):
            total += sum(word.scores)
            # each of the steps of two ways is wrong by half a unit in the last place of the sum, at most; twice that
            if word.margin < (len(text) + 1) * 2.0**-22 * (1 - total):
                uncertain.append(place)
        if not uncertain:
            return cut
        cut, total = list(cut), 0.0
        for place, text in enumerate(words[: uncertain[-1] + 1]):
            if place in uncertain:
                cut[place] = self._best(text, total)
            for score in cut[place].scores:
                total = _float32(total + score)
        return cut

    # --- BPE ----------------------------------------------------------------------------------------------

    def _merged(self, word: str) -> tuple[int, ...]:
        """Merge neighbours whose merged piece has the highest score, of equals the first, until there are none."""
        ids, scores = self._ids, self._scores
        parts: list[str] = []
        frozen: list[bool] = []
        place = 0
        while place < len(word):
            symbol = self._symbol(word, place) if self._symbol is not None else None
            parts.append(symbol[0] if symbol else word[place])
            frozen.append(symbol is not None)
            place += len(parts[-1])
        count = len(parts)
        before, after = list(range(-1, count - 1)), [*range(1, count), -1]
        heap: list[tuple[float, int, int, str]] = []
        halves: dict[str, tuple[str, str]] = {}  # of pieces that are steps alone

        def consider(left: int, right: int) -> None:
            if left < 0 or right < 0 or frozen[left] or frozen[right]:
                return
            text = parts[left] + parts[right]
            index = ids.get(text)
            if index is not None:
                heapq.heappush(heap, (-scores[index], left, right, text))
                if self.file.pieces[index].kind == UNUSED:
                    halves[text] = (parts[left], parts[right])

        for right in range(1, count):
            consider(right - 1, right)
        while heap:
            _, left, right, text = heapq.heappop(heap)
            if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != len(text):
                continue  # one of them was merged since
            parts[left], parts[right] = text, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])

        found: list[int] = []
        waiting = [part for part in reversed(parts) if part]
        while waiting:
            text = waiting.pop()
            if text in halves:
                waiting += reversed(halves[text])
                continue
            index = ids.get(text)
            found += self._of_unknown(text) if index is None else [index]
        return tuple(found)
