"""Strict YAML: what is refused, where it says so, and that plain values come out."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.recipe import yamlfile
from finetune.recipe.yamlfile import Origin

PLAIN = """\
# a comment with a non-breaking\u00a0space and a\ttab
a: 12
b: [1, 2e-4, 2026-11-24, no, 1:30, ~, "x # y", 0x1f, -1., true]
c:
  d:
  - {q: 'é'}
e: |
  two
  lines
"""


def test_plain_values_and_no_retyping() -> None:
    value = yamlfile.parse(PLAIN, "f").value
    assert value == {
        "a": 12,
        "b": [1, 2e-4, "2026-11-24", "no", "1:30", None, "x # y", 31, -1.0, True],
        "c": {"d": [{"q": "é"}]},
        "e": "two\nlines\n",
    }
    assert {type(item) for item in value["b"]} == {int, float, str, type(None), bool}
    assert type(value["a"]) is int
    assert type(value) is dict


def test_every_key_and_leaf_has_an_origin_counted_from_one() -> None:
    document = yamlfile.parse(PLAIN, "f")
    assert document.keys[("a",)] == Origin("f", 2, 1)
    assert document.values[("a",)] == Origin("f", 2, 4)
    assert document.values[("b", 1)] == Origin("f", 3, 8)
    assert document.keys[("c", "d", 0, "q")] == Origin("f", 6, 6)
    assert str(document.values[("c", "d", 0, "q")]) == "f:6:9"
    assert document.values[()] == Origin("f", 2, 1)


REFUSED = {
    "tag": ("a: !!int 3\n", "f:1:4: a", "tag"),
    "object tag": ("a: 1\nb: !!python/object:os.system x\n", "f:2:4: b", "tag"),
    "root tag": ("!!map {a: 1}\n", "f:1:1", "tag"),
    "key tag": ("!!str a: 1\n", "f:1:1: a", "plain word"),
    "anchor": ("a: &x 1\n", "f:1:4: a", "anchor"),
    "alias": ("a: 1\nb: *x\n", "f:2:4: b", "alias"),
    "recursive alias": ("a: &x [*x]\n", "f:1:4: a", "anchor"),
    "duplicate key": ("a: 1\nc:\n  b: 2\n  b: 3\n", "f:4:3: c.b", "first on line 3"),
    "duplicate in braces": ("a: {x: 1, x: 1}\n", "f:1:11: a.x", "twice"),
    "second document": ("a: 1\n---\nb: 2\n", "f:2:1", "second document"),
    "directive": ("%YAML 1.1\n---\na: no\n", "f:2:1", "directive"),
    "tab indent": ("a:\n\tb: 1\n", "f:2:1", "tab"),
    "tab after colon": ("a:\t1\n", "f:1:3", "tab"),
    "non-breaking space": ("a:\n\u00a0 b: 1\n", "f:2:1", "U+00A0"),
    "ideographic space": ("a:\u30001\n", "f:1:3", "U+3000"),
    "line separator": ("a: 1\u2028b: 2\n", "f:1:5", "U+2028"),
    "NUL": ("a: 1\nb: \x00\n", "f:2:4", "U+0000"),
    "lone carriage return": ("a: 1\rb: 2\n", "f:1:5", "U+000D"),
    "NaN": ("a: .nan\n", "f:1:4: a", "finite"),
    "infinity": ("a: -.inf\n", "f:1:4: a", "finite"),
    "overflow": ("a: 1e999\n", "f:1:4: a", "finite"),
    "leading zero": ("a: 010\n", "f:1:4: a", "octal"),
    "underscore": ("a: 1_000\n", "f:1:4: a", "_"),
    "huge number": (f"a: {'9' * 5000}\n", "f:1:4: a", "digits"),
    "many lines": ("a: b\n  c\n", "f:1:4: a", "several lines"),
    "quote before a key": ("a: 1\n'b: 1 # it\nc: 1 # it's\n", "f:2:1", "not valid YAML"),
    "stray quote": ("a: 'x # it\nb: 1 # it's\n", "f:1:4", "several lines"),
    "number as key": ("1: a\n", "f:1:1: 1", "plain word"),
    "null as key": ("~: a\n", "f:1:1: ~", "plain word"),
    "list as key": ("? [a]\n: 1\n", "f:1:3", "a key must be a word"),
    "too deep": ("a: " + "[" * 60 + "]" * 60 + "\n", "f:1:23", "deeper than 20"),
    "unclosed": ("a: 1\nb: [1, 2\n", "f:2:4", "not valid YAML"),
    "unclosed quote": ("a: 1\nb: 'x\n", "f:2:4", "not valid YAML"),
    "bad indent": ("a:\n    b: 1\n  c: 2\n", "f:3:3", "not valid YAML"),
    "bad escape": ('a: "\\q"\n', "f:1:6", "not valid YAML"),
    "block too deep": ("".join(f"{' ' * n}a:\n" for n in range(40)), "f:21:21", "deeper than 20"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_file_line_column(name: str) -> None:
    text, where, word = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        yamlfile.parse(text, "f")
    first = caught.value.faults[0]
    assert (first.where, word in first.what) == (where, True), str(first)


def test_all_faults_of_a_readable_file_come_together() -> None:
    with pytest.raises(RecipeError) as caught:
        yamlfile.parse("a: 012\nb: &x 1\nc: .nan\nc: 1\n", "f")
    assert [fault.where for fault in caught.value.faults] == ["f:1:4: a", "f:2:4: b", "f:3:4: c", "f:4:1: c"]


RAW = {
    "empty": (b"", ":1:1", "empty"),
    "comment only": (b"# nothing\n", ":1:1", "empty"),
    "null": (b"null\n", ":1:1", "empty"),
    "list at root": (b"- a\n", ":1:1", "mapping"),
    "text at root": (b"\n hello\n", ":2:2", "mapping"),
    "BOM": (b"\xef\xbb\xbfa: 1\n", ":1:1", "byte order mark"),
    "UTF-16": ("a: 1\n".encode("utf-16"), ":1:1", "byte order mark"),
    "latin-1": ("a: 1\nb: caf\u00e9\n".encode("latin-1"), ":2:7", "0xe9 is not UTF-8"),
    "too large": (b"a: 1\n" + b"#" * yamlfile.MAX_BYTES, ":1:1", "larger"),
}


@pytest.mark.parametrize("name", RAW)
def test_bad_files(name: str, tmp_path: Path) -> None:
    raw, where, word = RAW[name]
    file = tmp_path / "r.yaml"
    file.write_bytes(raw)
    with pytest.raises(RecipeError) as caught:
        yamlfile.load(file)
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].where == f"{file}{where}"
    assert word in caught.value.faults[0].what


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name, word in (("absent", "no such file"), ("pipe", "not a file"), (".", "not a file")):
        with pytest.raises(RecipeError, match=word):
            yamlfile.load(tmp_path / name)


def test_windows_line_ends_are_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"a: 1\r\nb: x\r\n")
    document = yamlfile.load(file)
    assert document.value == {"a": 1, "b": "x"}
    assert document.keys[("b",)].line == 2


def test_dump_reads_back_equal() -> None:
    tree = {
        "z": 1e-5,
        "a": ["no", None, True, "true", "1e5", "12", "2026-11-24", "1:30", "x: y", "# a", "", " ", "~", "é"],
        "n": [0.1, 1e22, -0.0, 5, 10**18, 2e-4],
        "e": {},
        "l": [],
        "long": "word " * 100 + "end",
    }
    text = yamlfile.dump(tree)
    assert yamlfile.parse(text, "f").value == tree
    assert list(yamlfile.parse(text, "f").value) == list(tree)


def test_damaged_text_never_escapes_as_another_exception() -> None:
    rng = random.Random(0)
    alphabet = "abc:-[]{},&*!|>'\"%@`#?~ \n\t01._\\é\u00a0\x00"
    places: list[str] = []
    for _ in range(1500):
        text = list(PLAIN if rng.random() < 0.5 else "a: 1\n")
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.randint(0, 2)] = [rng.choice(alphabet) for _ in range(rng.randint(0, 3))]
        try:
            yamlfile.parse("".join(text), "f")
        except RecipeError as error:
            places += [fault.where for fault in error.faults]
    assert len(places) > 500
    assert all(where.startswith("f:") for where in places)


def test_alias_bomb_is_refused_at_once() -> None:
    bomb = 'a: &a ["x","x"]\n' + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(RecipeError, match="anchor"):
        yamlfile.parse(bomb, "f")
