from __future__ import annotations

import csv

import pytest

from clipfast.data.table_rows import read_rows


def rows(path, data: str | bytes, **options):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return [(row.line, row.cells) for row in read_rows(path, **options)]


def test_quotes_in_a_tsv_are_characters(tmp_path):
    found = rows(tmp_path / "t.tsv", 'path\ttitle\na\t"a cat\nb\t5" disk"\r\nc\t"\n\nd\tx\u2028y\x85z\rw\n')
    assert found == [
        (1, ["path", "title"]),
        (2, ["a", '"a cat']),
        (3, ["b", '5" disk"']),
        (4, ["c", '"']),
        (6, ["d", "x\u2028y\x85z\rw"]),
    ]


def test_quotes_in_a_csv_and_where_they_are_asked_for(tmp_path):
    table = 'path,title\r\na,"a, ""cat""\nand a dog"\nb,5" disk\nc,\n"d",\u2028\n'
    expected = [
        (1, ["path", "title"]),
        (2, ["a", 'a, "cat"\nand a dog']),
        (4, ["b", '5" disk']),
        (5, ["c", ""]),
        (6, ["d", "\u2028"]),
    ]
    assert rows(tmp_path / "t.csv", table) == expected
    assert rows(tmp_path / "t.tsv", table.replace(", ", ";").replace(",", "\t"), quoted=True)[1] == (
        2,
        ["a", 'a;"cat"\nand a dog'],
    )
    assert rows(tmp_path / "t.csv", 'a,"b\nc,d"\n', quoted=False) == [(1, ["a", '"b']), (2, ["c", 'd"'])]
    assert rows(tmp_path / "t.csv", 'a;"b;c"\n', separator=";") == [(1, ["a", "b;c"])]


def test_a_table_is_read_as_the_csv_module_reads_it(tmp_path):
    """Where it has no blanks beside quotes: the module lets those pass."""
    import random

    generator = random.Random(0)
    table = [["".join(generator.choices('ab,"\n é', k=generator.randrange(6))) for _ in range(3)] for _ in range(300)]
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        theirs = list(csv.reader(file))
    assert [row.cells for row in read_rows(tmp_path / "t.csv")] == theirs == table


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ('p,t\na,ok\nb,"a cat\nc,a dog\n', "lines 3 to 4"),
        ('p,t\nb,"a cat\nc,"a dog"\n', "lines 2 to 3"),
        ('p,t\nb,"a cat" and more\n', "line 2 "),
        ('p,t\nb,"he said \\"no\\""\n', "line 2 "),
        ('p,t\n\n"x\n\ny",1\nb,"', "line 6 "),
    ],
)
def test_a_wrong_quote_in_a_csv_names_file_and_line(tmp_path, data, where):
    with pytest.raises(ValueError, match=rf"t.csv: got no row in {where}.*quote"):
        rows(tmp_path / "t.csv", data)


def test_a_quoted_cell_may_be_long(tmp_path):
    long = "x" * 300_000
    assert rows(tmp_path / "t.csv", f'a,"{long}"\n') == [(1, ["a", long])]


def test_separators_and_encodings_that_are_none(tmp_path):
    for separator in ("", ",,", "\n", '"'):
        with pytest.raises(ValueError, match="separator: got"):
            rows(tmp_path / "t.csv", "a,b", separator=separator)
    with pytest.raises(ValueError, match=r"t.csv: got 0xe9 at byte 5, expected UTF-8: give --encoding"):
        rows(tmp_path / "t.csv", b"a,caf\xe9\n")
    assert rows(tmp_path / "t.csv", b"a,caf\xe9\n", encoding="latin-1") == [(1, ["a", "café"])]
    assert rows(tmp_path / "t.tsv", "\ufeffa\tb\n".encode("utf-16"), encoding="utf-16") == [(1, ["a", "b"])]
