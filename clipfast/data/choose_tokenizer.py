"""Which tokenizer reads texts for a model: CLIP's, or one from a file that the user has; and whether it fits."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from clipfast.data.tokenizer import Tokenizer
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.models.config import TextConfig, list_models
from clipfast.models.foreign_config import config_of
from clipfast.models.model_folder import CONFIG_FILE

_FILES = "a tokenizer.json, a SentencePiece .model, or a folder with one"
# mT5's vocabulary has 100 tokens for pre-training that SigLIP's tables of embeddings lack
_LACKING = 128
# tables of embeddings are made larger than vocabularies, up to a multiple of this
_ROUNDED_TO = 1024


def get_tokenizer(name: str | os.PathLike[str], context_length: int | None = None) -> AnyTokenizer:
    """Return the tokenizer of a model's name or configuration, or what :meth:`clipfast.Tokenizer.from_file` reads.

    Raises:
        ValueError: An unknown name, or a model whose tokenizer comes from a file.
    """
    # the name of a model is no path, even where something of that name lies here
    path = None if os.fspath(name) in list_models() else Path(name)
    if path is not None and _is_a_models(path):
        text = config_of(path).text_cfg
        text = text if context_length is None else replace(text, context_length=context_length)
        return tokenizer_for(text, tokenizer_beside(path, text))
    if path is not None and path.exists() and not _reads_as_clip(path):
        return Tokenizer.from_file(path, context_length=context_length)
    text = config_of(name).text_cfg
    return tokenizer_for(text) if context_length is None else type(tokenizer_for(text))(context_length)


def _is_a_models(path: Path) -> bool:
    """Tell whether a path is the configuration file of a model, and no tokenizer's."""
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # said by whoever reads tokenizers
        return False
    return isinstance(found, dict) and "text_cfg" in found


def _reads_as_clip(path: Path) -> bool:
    """Tell whether a path is the folder of a run whose texts CLIP's tokenizer reads: it keeps no file of that."""
    if not (path / CONFIG_FILE).is_file():
        return False
    text = config_of(path).text_cfg
    return text.vocab_size == Tokenizer.vocab_size and tokenizer_beside(path, text) is None


def tokenizer_beside(model: str | os.PathLike[str], text: TextConfig) -> Path | None:
    """Return the folder of a model that a tokenizer lies in, as training or other libraries leave it; None for CLIP's.

    Args:
        model: The folder, the configuration's file in it, or a name.
        text: The model's text tower.
    """
    from clipfast.data.file_tokenizer import SETTINGS_FILE

    place = Path(model)
    folder = place if place.is_dir() else place.parent if place.suffix == ".json" and place.is_file() else None
    if folder is None:
        return None
    if (folder / SETTINGS_FILE).is_file():
        return folder
    other = text.vocab_size != Tokenizer.vocab_size and place.is_dir()
    return folder if other and ((folder / "tokenizer.json").is_file() or any(folder.glob("*.model"))) else None


def keep_tokenizer(tokenizer: AnyTokenizer, folder: Path) -> None:
    """Write a tokenizer to a model's folder, where :func:`tokenizer_beside` finds it; CLIP's needs no file."""
    from clipfast.data.file_tokenizer import SETTINGS_FILE, FileTokenizer

    if isinstance(tokenizer, FileTokenizer):
        tokenizer.save(folder)
    else:
        (folder / SETTINGS_FILE).unlink(missing_ok=True)


def tokenizer_for(text: TextConfig, tokenizer: AnyTokenizer | str | os.PathLike[str] | None = None) -> AnyTokenizer:
    """Return a tokenizer with a model's context; longer texts are cut.

    Args:
        text: The model's text tower.
        tokenizer: One, or what :meth:`clipfast.Tokenizer.from_file` reads; CLIP's by default.

    Raises:
        TypeError: It is no tokenizer.
        ValueError: Its vocabulary, context or EOS is not the model's; or there is none, and the model's vocabulary is
            not CLIP's.
    """
    length = text.context_length
    if tokenizer is None:
        if text.vocab_size != Tokenizer.vocab_size:
            raise ValueError(
                f"tokenizer: got none for a model with a vocabulary of {text.vocab_size}, which is not CLIP's "
                f"{Tokenizer.vocab_size}, expected {_FILES}: --tokenizer"
            )
        tokenizer = Tokenizer(length)
    elif isinstance(tokenizer, str | os.PathLike):
        tokenizer = Tokenizer.from_file(tokenizer, context_length=length)
    elif not isinstance(tokenizer, AnyTokenizer):
        raise TypeError(f"tokenizer: got {type(tokenizer).__name__}, expected one of clipfast.Tokenizer, or {_FILES}")
    elif tokenizer.context_length != length:
        raise ValueError(f"tokenizer: got a context of {tokenizer.context_length}, expected the model's {length}")
    _check_vocabulary(text, tokenizer)
    eos_id = text.vocab_size - 1 if text.eos_id is None else text.eos_id
    if text.pool_type == "eos" and tokenizer.eos_id != eos_id:
        raise ValueError(f"tokenizer: got the EOS id {tokenizer.eos_id}, expected {eos_id}, where the model reads")
    return tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.fitted(length, text.vocab_size)


def _check_vocabulary(text: TextConfig, tokenizer: AnyTokenizer) -> None:
    least = tokenizer.vocab_size - _LACKING
    most = -(-tokenizer.vocab_size // _ROUNDED_TO) * _ROUNDED_TO
    if tokenizer.eos_id is None:
        # CLIPA's tables have 32,000 rows for the 30,522 tokens of BERT
        most = max(most, 32_000)
    if not least <= text.vocab_size <= most:
        raise ValueError(
            f"tokenizer: got {tokenizer.vocab_size} tokens, expected the model's vocabulary of {text.vocab_size}"
        )
