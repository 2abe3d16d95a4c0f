"""What transformers' classes of tokenizers do beside their files, and what is known of families: two tables."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Habits:
    """What a class of transformers' does, or is known of a family.

    Attributes:
        clean: See :class:`TokenizerSettings`.
        before, after: Names of the special tokens around a text; None leaves it to the file: what a
            ``tokenizer.json`` says, or for a ``.model`` ``add_eos_token``.
        tokens: What special tokens are by default.
        pad_left: Whether rows are filled from the left by default.
        from_spm: Whether a ``.model`` file is read as transformers reads it for this class.
        spelled: Whether special tokens count where a text spells them out; for ``.model`` files.
    """

    clean: tuple[str, ...] = ()
    before: tuple[str, ...] | None = None
    after: tuple[str, ...] | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    pad_left: bool = False
    from_spm: bool = True
    spelled: bool = False


_GEMMA_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
_T5_TOKENS = {"eos_token": "</s>", "pad_token": "<pad>"}
_SIGLIP = Habits(("siglip",), (), ("eos_token",), {"eos_token": "</s>", "pad_token": "</s>"})
_T5 = Habits((), (), ("eos_token",), _T5_TOKENS, spelled=True)
CLASSES = {
    "SiglipTokenizer": _SIGLIP,
    "Siglip2Tokenizer": Habits(("lowercase",), None, None, _GEMMA_TOKENS, True),
    "GemmaTokenizer": Habits((), None, None, _GEMMA_TOKENS, True),
    "T5Tokenizer": _T5,
    "MT5Tokenizer": _T5,
    "XLMRobertaTokenizer": Habits(
        (),
        ("bos_token",),
        ("eos_token",),
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        spelled=True,
    ),
    "BertTokenizer": Habits(
        (),
        ("cls_token",),
        ("sep_token",),
        {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
        from_spm=False,
    ),
}
ANY = Habits(from_spm=False)

# by the first tokens of the vocabulary, for files that are alone
FAMILIES = (
    (("<pad>", "</s>", "<unk>"), _SIGLIP),
    (("<pad>", "<eos>", "<bos>", "<unk>"), Habits(("lowercase",), (), ("eos_token",), _GEMMA_TOKENS)),
)
