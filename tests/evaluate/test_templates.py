from __future__ import annotations

import pytest

from clipfast.evaluate.templates import TEMPLATES, load_templates


def test_names_and_files(tmp_path):
    assert load_templates("photo") == ("a photo of a {}.",)
    assert len(load_templates("simple")) == 7
    assert all(template.count("{}") == 1 for set_ in TEMPLATES.values() for template in set_)
    (tmp_path / "t.txt").write_text("a {c}\n\nmany {}\n")
    assert load_templates(tmp_path / "t.txt") == ("a {}", "many {}")
    (tmp_path / "t.json").write_text('["one {}"]')
    assert load_templates(tmp_path / "t.json") == ("one {}",)
    assert len(load_templates("imagenet")) == 80


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "without templates"), ("a cat\n", r"got 'a cat' .* expected a \{\}")],
)
def test_files_that_do_not_fit(tmp_path, text, message):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_templates(tmp_path / "t.txt")


def test_no_such_set():
    with pytest.raises(FileNotFoundError, match="got 'openai', expected one of name, photo, simple, imagenet, or"):
        load_templates("openai")
