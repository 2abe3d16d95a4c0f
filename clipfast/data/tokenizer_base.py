"""What CLIP's tokenizer and those from files have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor


class AnyTokenizer(ABC):
    """Texts to token ids ``[B, context_length]``, int64, on the CPU.

    Attributes:
        context_length: Tokens in a row.
        sot_id, eos_id: What a row's tokens begin and end with; None where there is nothing.
        pad_id: What fills a row.
        vocab_size: Tokens that there are.
        identity: What tokens depend on, beside the context's length: the same for the same tokens.
    """

    context_length: int
    sot_id: int | None
    eos_id: int | None
    pad_id: int
    vocab_size: int
    identity: str

    @abstractmethod
    def __call__(self, texts: str | Iterable[str], context_length: int | None = None) -> Tensor:
        """Token ids of a batch of texts."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The token ids of one text, without special tokens around it, padding or truncation."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids."""


def checked_texts(texts: str | Iterable[str]) -> list[str]:
    """Return one text or several as a list.

    Raises:
        TypeError: They are neither a str nor an iterable of str.
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes | bytearray | dict) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a str or a list of str, got {type(texts).__name__}")
    texts = list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] must be a str, got {type(text).__name__}")
    return texts
