"""A shell script's command lines: read as a shell would split them, and never run."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import shellscript
from finetune.errors import RecipeError

SOURCE = Path("x.sh")


def words(text: str) -> list[tuple[str, ...]]:
    return [command.words for command in shellscript.commands(text, SOURCE)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a --b c", [("a", "--b", "c")]),
        ("a \\\n  --b \\\n  c\nd", [("a", "--b", "c"), ("d",)]),
        ("a 'b  c' \"d e\"", [("a", "b  c", "d e")]),
        ("a b#c # d", [("a", "b#c")]),
        ("# a\n  # b\\\nc", [("c",)]),
        ("a; b && c | d & e", [("a",), ("b",), ("c",), ("d",), ("e",)]),
        ("X=1\na $X ${X}2 '$X' \"$X\" \\$X", [("a", "1", "12", "$X", "1", "$X")]),
        ('ARGS="\n  --n 2 \\\n  --m 3\n"\na $ARGS "$ARGS"', [("a", "--n", "2", "--m", "3", "\n  --n 2   --m 3\n")]),
        ("X=2 a", [("a",)]),
        ("export X=1 Y=2\na $X$Y", [("a", "12")]),
        ('X=\'a" b\'\nc "$X"', [("c", 'a" b')]),
        ("a 'it''s'", [("a", "its")]),
        ("X=$1\nY=1\nY=$1\na $X $Y", [("a", "$X", "1")]),
        ("a $(rm -rf b) c", [("a", "$(…)", "c")]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[tuple[str, ...]]) -> None:
    assert words(text) == expected


def test_lines_and_variables_of_a_command() -> None:
    found = shellscript.commands("N=1\n\nM=3 a \\\n b\n", SOURCE)
    assert [(one.line, dict(one.variables)) for one in found] == [(3, {"N": "1", "M": "3"})]


@pytest.mark.parametrize(
    ("word", "part"), [("a$1", "$1"), ("$(ls)", "$(ls)"), ("`x`", "`x`"), ("${A}b", "${A}b"), ("a$", "")]
)
def test_what_only_a_shell_knows(word: str, part: str) -> None:
    assert shellscript.unknown(word) == part


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    assert words("a $SECRET ${SECRET}") == [("a", "$SECRET", "${SECRET}")]


def test_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words("a $(touch made) `touch made`; touch made\nX=`touch made`\nb $X")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["a 'b", 'a "b\nc', "X='\n"])
def test_an_open_quote_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(RecipeError, match=r"x\.sh:1: the quote"):
        words(text)


def test_growth_without_end_is_refused() -> None:
    """Forty doublings would be a terabyte."""
    text = "A0=aaaaaaaaaa\n" + "".join(f"A{n + 1}=$A{n}$A{n}\n" for n in range(40)) + "b $A40\n"
    with pytest.raises(RecipeError, match="more than 100000 characters"):
        words(text)
    with pytest.raises(RecipeError, match="larger than"):
        words("a" * 1_000_001)
