"""The command lines of a shell script, read and never run.

Only what such scripts need is understood: words, quotes, comments, lines that go on, assignments at the start of a
command, and ``$NAME`` of a variable that the script itself sets to a text. Nothing comes from the environment. What
only a shell could know (``$1``, ``$(…)``, backquotes) stays in the word, and ``unknown`` finds it.
"""

from __future__ import annotations

import re
import shlex
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune.errors import RecipeError

_MOST_TEXT = 1_000_000
_MOST_WORD = 100_000
"""Characters of one command line: a script that doubles a variable forty times is no recipe."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
_UNKNOWN = re.compile(r"\$[\w{(@*#?!-]|`")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One simple command: its words, the variables that stand before it or were set above, and its first line."""

    words: tuple[str, ...]
    variables: Mapping[str, str]
    line: int


def commands(text: str, source: Path) -> list[Command]:
    """Every simple command of the script, in order, with the script's own variables filled in.

    Raises:
        RecipeError: an open quote, or a script that is too large, or grows so while variables are filled in.
    """
    if len(text) > _MOST_TEXT:
        raise RecipeError(f"larger than {_MOST_TEXT} characters: this is no script of settings", str(source))
    found: list[Command] = []
    variables: dict[str, str] = {}
    for line, raw in _simple(text, source):
        filled = _filled(raw, variables)
        if len(filled) > _MOST_WORD:
            raise RecipeError(f"a command of more than {_MOST_WORD} characters", f"{source}:{line}", "write it out")
        try:
            words = shlex.split(filled)
        except ValueError as error:
            raise RecipeError(f"not readable as a command: {error}", f"{source}:{line}", "close the quote") from None
        if words and words[0] in ("export", "declare", "local", "readonly"):
            words = words[1:]
        own: dict[str, str] = {}
        while words and _assignment(words[0]):
            name, _, value = words.pop(0).partition("=")
            # A value that only a shell knows ($1) does not replace one that the script states: that is its default.
            if not unknown(value) or name not in variables:
                own[name] = value
        if words:
            found.append(Command(words=tuple(words), variables=ChainMap(own, variables), line=line))
        else:
            variables |= own
    return found


def unknown(word: str) -> str:
    """The part of a word that only a shell could fill in; empty where there is none."""
    match = _UNKNOWN.search(word)
    return word[match.start() :][:40] if match else ""


def _assignment(word: str) -> bool:
    name, sign, _ = word.partition("=")
    return bool(sign) and _NAME.fullmatch(name) is not None


def _simple(text: str, source: Path) -> Iterator[tuple[int, str]]:
    """(first line, text) of each simple command: cut at line ends and operators outside quotes, without comments."""
    at, line, begin, current, quote = 0, 1, 1, "", ""
    while at < len(text):
        char = text[at]
        line += char == "\n"
        if quote:
            if char == "\\" and quote == '"' and at + 1 < len(text):
                line += text[at + 1] == "\n"
                current += "" if text[at + 1] == "\n" else text[at : at + 2]
                at += 2
                continue
            current += char
            quote = "" if char == quote else quote
        elif char == "\\" and at + 1 < len(text):
            line += text[at + 1] == "\n"
            current += " " if text[at + 1] == "\n" else text[at : at + 2]
            at += 2
            continue
        elif char == "#" and (not current or current[-1].isspace()):
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
            continue
        elif text.startswith("$(", at):
            end = text.find(")", at)
            at = len(text) if end < 0 else end + 1
            current += "$(…)"
            continue
        elif char in "\n;|&()":
            if current.strip():
                yield begin, current
            current, begin = "", line
        else:
            if not current.strip():
                begin = line
            current += char
            quote = char if char in "'\"" else ""
        at += 1
    if quote:
        raise RecipeError(f"the quote {quote} is never closed", f"{source}:{begin}", "close it")
    if current.strip():
        yield begin, current


def _filled(text: str, variables: dict[str, str]) -> str:
    """``$NAME`` outside single quotes as the script set it: in double quotes one word, else as many as it holds."""
    made, inside = "", ""
    for part in re.split(r"('|\"|\\.)", text):
        if part in ("'", '"') and inside in ("", part):
            inside = "" if inside else part
        elif inside != "'" and not part.startswith("\\"):
            part = _VARIABLE.sub(partial(_value, variables=variables, quoted=inside == '"'), part)
        made += part
        if len(made) > _MOST_WORD:
            break
    return made


def _value(match: re.Match[str], *, variables: Mapping[str, str], quoted: bool) -> str:
    value = variables.get(match[1] or match[2])
    if value is None:
        return match[0]
    if quoted:
        return re.sub(r'(["\\$`])', r"\\\1", value) if not unknown(value) else match[0]
    return " ".join(map(shlex.quote, value.split())) if not unknown(value) else match[0]
