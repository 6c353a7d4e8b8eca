"""Random single edits of a recipe's text, as a hurried person makes them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_LINE = re.compile(r"^(\s*)([A-Za-z_]+):(?: ([^\s#].*?))?( #.*)?$")
_LETTERS = "abcdefghijklmnopqrstuvwxyz_"


class Edit(NamedTuple):
    """A damaged text; ``key`` (``train.steps``) and ``line`` (from 1) say what was touched."""

    kind: str
    text: str
    line: int
    key: str


class Line(NamedTuple):
    """One ``key: value # comment`` line of a shipped recipe."""

    number: int
    indent: str
    key: str
    value: str
    comment: str
    path: str

    def text(self, **changed: str) -> str:
        part = self._replace(**changed)  # type: ignore[arg-type]
        return f"{part.indent}{part.key}:{f' {part.value}' if part.value else ''}{part.comment}"


def lines_of(text: str) -> list[Line]:
    """The key lines of a recipe in the shipped style: two levels, one key a line."""
    found: list[Line] = []
    section = ""
    for number, line in enumerate(text.split("\n"), 1):
        match = _LINE.match(line)
        if not match or line.startswith("#"):
            continue
        indent, key, value, comment = (part or "" for part in match.groups())
        section = section if indent else key
        found.append(Line(number, indent, key, value, comment, f"{section}.{key}" if indent else key))
    return found


def edits(text: str, count: int, seed: int) -> Iterator[Edit]:
    """``count`` edits that change the text, each made from the undamaged one."""
    rng = random.Random(seed)
    lines = lines_of(text)
    while count:
        kind = rng.choice(list(KINDS))
        line = rng.choice(lines)
        new = KINDS[kind](line, rng, text)
        if new is None or new == text:
            continue
        count -= 1
        yield Edit(kind, new, line.number, line.path)


def _replaced(text: str, line: Line, new: str | None) -> str:
    rows = text.split("\n")
    rows[line.number - 1 : line.number] = [] if new is None else new.split("\n")
    return "\n".join(rows)


def _typo(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word))
    kind = rng.choice(("drop", "swap", "double", "replace", "insert", "case"))
    if kind == "drop":
        return word[:at] + word[at + 1 :]
    if kind == "swap":
        return word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
    if kind == "double":
        return word[:at] + word[at] + word[at:]
    if kind == "replace":
        return word[:at] + rng.choice(_LETTERS) + word[at + 1 :]
    if kind == "insert":
        return word[:at] + rng.choice(_LETTERS) + word[at:]
    return word[:at] + word[at].swapcase() + word[at + 1 :]


def _key_typo(line: Line, rng: random.Random, text: str) -> str | None:
    return _replaced(text, line, line.text(key=_typo(line.key, rng)))


def _value_typo(line: Line, rng: random.Random, text: str) -> str | None:
    return _replaced(text, line, line.text(value=_typo(line.value, rng))) if line.value else None


def _wrong_type(line: Line, rng: random.Random, text: str) -> str | None:
    values = ["true", "no", "yes", "null", "3", "2.5", "'7'", "text", "[1, 2]", "{a: 1}", "2026-11-24", '""', "-", "~"]
    return _replaced(text, line, line.text(value=rng.choice(values)))


def _out_of_range(line: Line, rng: random.Random, text: str) -> str | None:
    if not re.fullmatch(r"[\d.e-]+", line.value):
        return None
    values = [
        "0",
        "-1",
        "1e9",
        "99999999999",
        ".nan",
        ".inf",
        "-.inf",
        "1e999",
        "010",
        "1_000",
        f"-{line.value}",
        "0.5",
    ]
    return _replaced(text, line, line.text(value=rng.choice(values)))


def _digit(line: Line, rng: random.Random, text: str) -> str | None:
    places = [at for at, one in enumerate(line.value) if one.isdigit()]
    if not places:
        return None
    at = rng.choice(places)
    digit = rng.choice(["", *"0123456789", "00"])
    return _replaced(text, line, line.text(value=line.value[:at] + digit + line.value[at + 1 :]))


def _delete_line(line: Line, rng: random.Random, text: str) -> str | None:
    return _replaced(text, line, None)


def _delete_value(line: Line, rng: random.Random, text: str) -> str | None:
    return _replaced(text, line, line.text(value="")) if line.value else None


def _delete_key(line: Line, rng: random.Random, text: str) -> str | None:
    return _replaced(text, line, f"{line.indent}{line.value}{line.comment}") if line.value else None


def _indent(line: Line, rng: random.Random, text: str) -> str | None:
    return _replaced(text, line, line.text(indent=" " * rng.choice((0, 1, 2, 3, 4, 6))))


def _duplicate(line: Line, rng: random.Random, text: str) -> str | None:
    return _replaced(text, line, f"{line.text()}\n{line.text()}")


def _join(line: Line, rng: random.Random, text: str) -> str | None:
    rows = text.split("\n")
    if line.number >= len(rows):
        return None
    rows[line.number - 1 : line.number + 1] = [line.text(comment="") + " " + rows[line.number].strip()]
    return "\n".join(rows)


def _syntax(line: Line, rng: random.Random, text: str) -> str | None:
    whole = line.text()
    body = len(whole) - len(line.comment)
    at = rng.randrange(body + 1)
    sign = rng.choice(
        ["[", "]", "{", "}", '"', "'", "&a ", "*a ", "!x ", "|", ">", "%", "@", "`", ":", ",", "#", " #", "- ", "\t"]
    )
    return _replaced(text, line, whole[:at] + sign + whole[at + rng.randint(0, 1) :])


def _colon(line: Line, rng: random.Random, text: str) -> str | None:
    sign = rng.choice(["", " ", "=", ";", ": :", " :", "::", ":\u00a0", "\u00a0:", "\uff1a"])
    return _replaced(text, line, line.text().replace(":", sign, 1))


def _stray(line: Line, rng: random.Random, text: str) -> str | None:
    stray = rng.choice(
        ["---", "...", "%YAML 1.1", "x", "- a", "seed: 3", "\ufeff", "\x00", "}", "  steps: 3", "extends: x.yaml"]
    )
    return _replaced(text, line, f"{stray}\n{line.text()}")


def _swap_lines(line: Line, rng: random.Random, text: str) -> str | None:
    rows = text.split("\n")
    if line.number >= len(rows):
        return None
    rows[line.number - 1 : line.number + 1] = rows[line.number - 1 : line.number + 1][::-1]
    return "\n".join(rows)


KINDS: dict[str, Callable[[Line, random.Random, str], str | None]] = {
    "key typo": _key_typo,
    "value typo": _value_typo,
    "wrong type": _wrong_type,
    "out of range": _out_of_range,
    "digit": _digit,
    "line deleted": _delete_line,
    "value deleted": _delete_value,
    "key deleted": _delete_key,
    "indentation": _indent,
    "line doubled": _duplicate,
    "lines joined": _join,
    "lines swapped": _swap_lines,
    "syntax sign": _syntax,
    "colon": _colon,
    "stray line": _stray,
}
