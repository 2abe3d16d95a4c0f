"""Every configuration of open_clip is served or left alone with a reason, and computes what it did."""

from __future__ import annotations

import re
from pathlib import Path

import open_clip
import pytest
from configurations import outcome_of

PAGE = Path(__file__).parents[2] / "docs" / "accelerate.md"
ROW = re.compile(r"^\| (.+?) \| (.+?) \| (\d+): (.+?) \|$", re.MULTILINE)

# one of each kind, small; what each tower must be
KINDS = {
    "ViT-B-32": (True, True),
    "RN50": (False, True),
    "ViT-H-14-worldwide": (True, True),
    "ViT-bigG-14-CLIPA": (True, True),
    "roberta-ViT-B-32": (True, False),
    "ViT-B-16-SigLIP": (True, True),
    "EVA02-B-16": (False, True),
    "vit_relpos_medium_patch16_cls_224": (False, True),
}


def documented() -> dict[str, tuple[str, str]]:
    """Return what the table in docs/accelerate.md says of each configuration's towers."""
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    named = {name: (image, text) for image, text, _, names in rows for name in names.split(", ")}
    assert sum(int(count) for _, _, count, _ in rows) == len(named)
    return named


def check(name: str) -> tuple[bool, bool]:
    outcome = outcome_of(name)
    assert outcome.error <= 1e-10
    assert "no reason" not in (outcome.image, outcome.text)
    return outcome.image == "served", outcome.text == "served"


@pytest.mark.parametrize("name", KINDS)
def test_one_of_each_kind(name: str) -> None:
    assert check(name) == KINDS[name]


def test_the_table_names_every_configuration() -> None:
    assert sorted(documented()) == sorted(open_clip.list_models())
    for name, served in KINDS.items():
        assert tuple(said == "served" for said in documented()[name]) == served


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_configuration(name: str) -> None:
    assert check(name) == tuple(said == "served" for said in documented()[name])
