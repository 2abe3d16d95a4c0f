"""What a tokenizer's file, and the files beside it, say that a model's own tokenizer does.

transformers' ``tokenizer_config.json`` names special tokens and a class, whose habits are a row of ``CLASSES``;
``open_clip_config.json`` names what open_clip does before and after. What nothing says is an error, never a guess, but
for files that are recognised by their special tokens: a row of ``FAMILIES``.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.models import WordLevel

from clipfast.data.cleaning import CLEANERS
from clipfast.data.file_tokenizer import SETTINGS_FILE, FileTokenizer, TokenizerSettings, open_file
from clipfast.data.spm import Spm
from clipfast.data.tokenizer_habits import ANY, CLASSES, FAMILIES, Habits

_CLEAN = ("none", *CLEANERS, "lowercase")
# the names of SentencePiece's files: as of T5 and SigLIP, Llama and Gemma, and fairseq
_SPM_FILES = (
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "gemma_tokenizer.model",
)
_FAIRSEQ_FILE = "sentencepiece.bpe.model"


_FAMILY_CONTEXT = 64


def read_tokenizer(
    path: str | os.PathLike[str],
    context_length: int | None = None,
    clean: str | None = None,
    pad_id: int | None = None,
    strip_sep_token: bool | None = None,
) -> FileTokenizer | int:
    """Read a tokenizer; the arguments and errors are those of :meth:`clipfast.Tokenizer.from_file`.

    Returns:
        The tokenizer; or, for a folder of open_clip's whose tokenizer is CLIP's, the context's length alone.
    """
    if clean is not None and clean not in _CLEAN:
        raise ValueError(f"clean: got {clean!r}, expected one of {', '.join(_CLEAN)}")
    if strip_sep_token is not None and not isinstance(strip_sep_token, bool):
        raise ValueError(f"strip_sep_token: got {strip_sep_token!r}, expected True or False")
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    said = _Said.of(folder)
    if path.is_dir():
        if (folder / SETTINGS_FILE).is_file():
            if (clean, pad_id, strip_sep_token) != (None, None, None):
                raise ValueError(
                    f"clean, pad_id, strip_sep_token: got {clean}, {pad_id} and {strip_sep_token} for {folder}, which "
                    f"says all of it, expected none of them"
                )
            return _of_run(folder, context_length)
        path = _file_in(folder, said)
        if path is None:
            return context_length or int(said.text_cfg.get("context_length", 77))
    elif not path.is_file():
        raise FileNotFoundError(f"tokenizer: got {path}, expected a tokenizer.json, a .model, or a folder with one")
    data = path.read_bytes()
    try:
        model = open_file(data)
        settings, usual_context = _resolve(model, path, said, clean, pad_id, strip_sep_token)
        context = usual_context if context_length is None else context_length
        if context is None:
            raise ValueError("context_length: got none, and no file says it, expected the model's")
        return FileTokenizer(data, settings, context, opened=model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _Said:
    """What lies beside a tokenizer: tokenizer_config.json with special_tokens_map.json, config.json, open_clip's."""

    config: dict[str, Any]
    model_type: str
    open_clip: bool
    text_cfg: dict[str, Any]

    @classmethod
    def of(cls, folder: Path) -> _Said:
        config = _json_of(folder / "special_tokens_map.json") | _json_of(folder / "tokenizer_config.json")
        model_cfg = _json_of(folder / "open_clip_config.json").get("model_cfg")
        text_cfg = model_cfg.get("text_cfg", {}) if isinstance(model_cfg, dict) else {}
        model_type = str(_json_of(folder / "config.json").get("model_type", ""))
        return cls(config, model_type, model_cfg is not None, text_cfg)

    @property
    def of_hugging_face(self) -> bool:
        return bool(self.text_cfg.get("hf_tokenizer_name"))

    @property
    def tokenizer_class(self) -> str:
        name = str(self.config.get("tokenizer_class") or "").removesuffix("Fast")
        if name == "GemmaTokenizer" and self._is_siglip2():
            return "Siglip2Tokenizer"
        return name

    def _is_siglip2(self) -> bool:
        processor = str(self.config.get("processor_class") or "").lower()
        return "siglip" in self.model_type or "siglip" in processor or self.config.get("do_lower_case") is True

    def token(self, name: str, habits: Habits) -> str | None:
        value = self.config.get(name, habits.tokens.get(name))
        return value.get("content") if isinstance(value, dict) else value


def _json_of(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"tokenizer: {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"tokenizer: got {type(values).__name__} in {path}, expected an object")
    return values


def _of_run(folder: Path, context_length: int | None) -> FileTokenizer:
    facts = _json_of(folder / SETTINGS_FILE)
    try:
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in facts["settings"].items()}
        data = (folder / Path(facts["file"]).name).read_bytes()
        return FileTokenizer(data, TokenizerSettings(**values), context_length or facts["context_length"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"tokenizer: {folder / SETTINGS_FILE} is damaged: {error}") from error


def _file_in(folder: Path, said: _Said) -> Path | None:
    """Return the file of a folder's tokenizer, as transformers chooses it; None for CLIP's own."""
    if said.open_clip and not said.of_hugging_face:
        if said.text_cfg.get("tokenizer_kwargs"):
            options = said.text_cfg["tokenizer_kwargs"]
            raise ValueError(f"tokenizer: got {options} as tokenizer_kwargs of CLIP's own in {folder}, expected none")
        return None
    spm = [folder / name for name in _SPM_FILES if (folder / name).is_file()]
    if not spm:
        spm = sorted(folder.glob("*.model"))
    whole = folder / "tokenizer.json"
    if whole.is_file() and not (said.tokenizer_class == "SiglipTokenizer" and spm):
        return whole
    if len(spm) != 1:
        raise FileNotFoundError(
            f"tokenizer: got the folder {folder} with {len(spm)} .model files, expected a tokenizer.json or one .model"
        )
    return spm[0]


# --- what it comes to -------------------------------------------------------------------------------------


def _resolve(
    model: Spm | tokenizers.Tokenizer,
    path: Path,
    said: _Said,
    clean: str | None,
    pad_id: int | None,
    strip_sep_token: bool | None,
) -> tuple[TokenizerSettings, int | None]:
    """Return the settings, and how long the context is where that is said."""
    of_spm = isinstance(model, Spm)
    options = _open_clip_options(said)
    name = said.tokenizer_class
    habits = (CLASSES.get(name) if name else _family(model)) or ANY
    if of_spm and name and not habits.from_spm:
        raise ValueError(f"got a .model of {name}, expected its tokenizer.json")
    fairseq = of_spm and name == "XLMRobertaTokenizer"
    if of_spm and not name and path.name == _FAIRSEQ_FILE:
        raise ValueError(
            "got fairseq's file without tokenizer_config.json, which would say what its ids are, expected both, or "
            "tokenizer.json"
        )
    if said.config.get("do_lower_case") is False and "siglip" in habits.clean:
        raise ValueError("got do_lower_case = false in tokenizer_config.json, expected true, as SigLIP has it")
    if of_spm and habits is ANY and clean is None and not said.of_hugging_face:
        raise ValueError(
            f"clean: got none for a .model whose tokens are not SigLIP's, and no tokenizer_config.json beside it says "
            f"its class, expected one of {', '.join(_CLEAN)}"
        )
    ids = _Ids(model, fairseq)
    before, after = _around(model, said, habits, ids)
    steps = habits.clean
    if said.of_hugging_face:
        steps = (options.get("clean", "whitespace"), *steps)
    if clean is not None:
        steps = () if clean == "none" else (clean,)
    own_padding = {} if of_spm else _padding(model)
    if pad_id is None:
        pad_id = _pad_id(said, habits, ids, own_padding)
    strip = options.get("strip_sep_token", False) if strip_sep_token is None else strip_sep_token
    separator = said.token("sep_token", habits) or "[SEP]"
    zeroed = ids.of(separator) if strip else None
    if strip and zeroed is None:
        raise ValueError(f"strip_sep_token: got True for a vocabulary without {separator}, expected one with it")
    side = said.config.get("padding_side") or ("left" if habits.pad_left else own_padding.get("direction", "right"))
    settings = TokenizerSettings(
        steps,
        before,
        after,
        pad_id,
        side == "left",
        said.config.get("truncation_side") == "left",
        zeroed,
        fairseq,
        _spelled(said, habits, ids) if of_spm and habits.spelled else (),
    )
    return settings, _context(said, habits)


def _open_clip_options(said: _Said) -> dict[str, Any]:
    if not said.of_hugging_face:
        return {}
    options = said.text_cfg.get("tokenizer_kwargs") or {}
    mode = said.text_cfg.get("tokenizer_mode")
    unknown = {k: v for k, v in options.items() if k not in ("clean", "strip_sep_token") and v is not None}
    if mode or unknown or options.get("clean", "lower") not in ("whitespace", "lower", "canonicalize"):
        raise ValueError(
            f"open_clip_config.json: got tokenizer_mode {mode!r} and tokenizer_kwargs {options}, expected clean "
            f"(whitespace, lower or canonicalize) and strip_sep_token"
        )
    return options


def _context(said: _Said, habits: Habits) -> int | None:
    length = said.text_cfg.get("context_length", 77 if said.of_hugging_face else None)
    if length is None:
        length = said.config.get("model_max_length")
        # transformers' way to say that there is no limit
        length = None if length is None or length > 1_000_000 else int(length)
    known = any(habits is family for _, family in FAMILIES)
    return _FAMILY_CONTEXT if length is None and known else length


class _Ids:
    """The ids of special tokens."""

    def __init__(self, model: Spm | tokenizers.Tokenizer, fairseq: bool) -> None:
        if isinstance(model, Spm):
            ids = {piece.text: index for index, piece in enumerate(model.file.pieces)}
            if fairseq:
                ids |= {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": len(model.file.pieces) + 1}
            self.of = ids.get
        else:
            self.of = model.token_to_id

    def expected(self, name: str, token: str | None) -> int:
        index = None if token is None else self.of(token)
        if index is None:
            raise ValueError(f"{name}: got {token!r}, expected a token of the vocabulary")
        return index


def _family(model: Spm | tokenizers.Tokenizer) -> Habits | None:
    def token(index: int) -> str | None:
        if isinstance(model, Spm):
            return model.file.pieces[index].text if index < len(model.file.pieces) else None
        return model.id_to_token(index)

    return next((h for first, h in FAMILIES if tuple(map(token, range(len(first)))) == first), None)


def _around(
    model: Spm | tokenizers.Tokenizer, said: _Said, habits: Habits, ids: _Ids
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that stand before and after a text's."""
    if habits.before is not None and habits.after is not None:
        before, after = habits.before, habits.after
    elif not isinstance(model, Spm):
        return _template(model)  # transformers does not look at add_eos_token then
    elif {"add_bos_token", "add_eos_token"} & said.config.keys():
        before = ("bos_token",) if said.config.get("add_bos_token") else ()
        after = ("eos_token",) if said.config.get("add_eos_token") else ()
    else:
        return (), (() if model.file.eos_id is None else (model.file.eos_id,))
    found = [tuple(ids.expected(name, said.token(name, habits)) for name in names) for names in (before, after)]
    return found[0], found[1]


def _spelled(said: _Said, habits: Habits, ids: _Ids) -> tuple[tuple[str, int], ...]:
    names = [f"{name}_token" for name in ("bos", "eos", "pad", "cls", "sep", "mask")]
    tokens = {said.token(name, habits) for name in names} | {said.token("unk_token", habits) or "<unk>"}
    found = {token: ids.of(token) for token in sorted(token for token in tokens if token)}
    return tuple((token, index) for token, index in found.items() if index is not None)


def _template(model: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ask the post-processor what it puts around a text of one token."""
    if model.post_processor is None:
        return (), ()
    token = tokenizers.Tokenizer(WordLevel({"x": 0}, unk_token="x")).encode("x")
    made = model.post_processor.process(token, None, True)
    place = made.sequence_ids.index(0)
    return tuple(made.ids[:place]), tuple(made.ids[place + 1 :])


def _padding(model: tokenizers.Tokenizer) -> dict[str, Any]:
    return model.padding or {}


def _pad_id(said: _Said, habits: Habits, ids: _Ids, own: dict[str, Any]) -> int:
    token = said.token("pad_token", habits)
    if token is not None and "pad_token" not in said.config and "pad_id" in own:
        return int(own["pad_id"])  # a file alone that says it itself
    if token is not None:
        return ids.expected("pad_token", token)
    if "pad_id" in own:
        return int(own["pad_id"])
    for usual in ("<pad>", "[PAD]"):
        if (index := ids.of(usual)) is not None:
            return index
    raise ValueError("pad_id: got none, and no file says what rows are filled with, expected an id")
