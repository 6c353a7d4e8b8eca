"""Strict YAML 1.2: plain values out, and where each key and value was written.

What YAML allows but a recipe never needs is refused, because each of these has silently changed somebody's run: tags,
anchors and aliases, duplicate keys, more than one document, directives, plain text over several lines, ``012`` and
``1_000``, NaN and infinity, tabs and look-alike spaces. A bare date stays text. Built on ruamel.yaml's parser events
alone: no object is ever constructed.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    NodeEvent,
    ScalarEvent,
    SequenceStartEvent,
)
from ruamel.yaml.nodes import ScalarNode

from finetune.errors import Fault, RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_DIGITS = 19  # what a 64-bit integer can need

KeyPath = tuple[str | int, ...]

# Characters that look like a blank or end a line for some readers only, and characters no text file holds.
_LOOKALIKE = re.compile("[\t\u0085\u00a0\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f\u2060\u3000\ufeff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]|\r(?!\n)")


class Origin(NamedTuple):
    """Where something was written; ``line`` and ``column`` count from 1, ``line`` 0 is the command line."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Document:
    """A parsed document; ``keys`` and ``values`` map ``("train", "steps")`` to an origin, ``()`` is the root."""

    value: Any
    keys: dict[KeyPath, Origin]
    values: dict[KeyPath, Origin]
    text: str


def load(path: Path) -> Document:
    """Read a YAML file whose root is a mapping. Raises ``RecipeError`` with one fault per thing wrong."""
    name = str(path)
    document = parse(_read_text(path), name)
    if not isinstance(document.value, dict):
        what = "the file is empty" if document.value is None else "the file must be a mapping of 'key: value' lines"
        raise RecipeError(what, str(document.values.get((), Origin(name, 1, 1))))
    return document


def parse(text: str, source: str) -> Document:
    """Parse YAML text with any root; an empty text gives ``None``. Raises ``RecipeError``."""
    _refuse_characters(text, source)
    reader = _Reader(source)
    try:
        value = reader.document(_events(text))
    except MarkedYAMLError as error:
        # An open bracket or quote is to be mended where it opened, not where the parser gave up.
        open_end = "stream" in str(error.problem) or "simple key" in str(error.context)
        mark = error.context_mark if open_end and error.context_mark else error.problem_mark
        raise RecipeError(_problem(error), str(_origin(source, mark)), _SYNTAX_FIX) from None
    except YAMLError:
        raise RecipeError("not valid YAML", str(Origin(source, 1, 1)), _SYNTAX_FIX) from None
    if reader.faults:
        raise RecipeError.of(reader.faults)
    return Document(value, reader.keys, reader.values, text)


def dump(tree: dict[str, Any]) -> str:
    """YAML text of plain values, in the order given; ``parse`` gives equal values, unless a text holds a line end."""
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 1_000_000  # a long text folded over lines would be refused on reading
    stream = io.StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


_SYNTAX_FIX = "check the indentation, colon, quotes and brackets here and on the line before"


def _read_text(path: Path) -> str:
    name = str(path)
    if not path.exists():
        raise RecipeError("no such file", name)
    if not path.is_file():
        raise RecipeError("not a file", name)
    try:
        with path.open("rb") as stream:  # not read_bytes: a huge file is refused without being read
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", name) from None
    start = str(Origin(name, 1, 1))
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES} bytes: this is not a recipe", start)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        raise RecipeError("starts with a byte order mark", start, "save the file as UTF-8 without BOM")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        where = position(before, len(before), name)
        raise RecipeError(f"byte 0x{raw[error.start]:02x} is not UTF-8", str(where), "save the file as UTF-8") from None


def _refuse_characters(text: str, source: str) -> None:
    """Look-alikes are harmless in a comment; control characters are refused anywhere."""
    if found := _CONTROL.search(text):
        raise RecipeError(
            f"control character U+{ord(found[0][0]):04X}", str(position(text, found.start(), source)), "remove it"
        )
    for number, line in enumerate(text.split("\n"), 1):
        code = "" if line.lstrip().startswith("#") else line.split(" #")[0]
        if found := _LOOKALIKE.search(code):
            name = "tab character" if found[0] == "\t" else f"look-alike of a space, U+{ord(found[0]):04X}"
            raise RecipeError(name, str(Origin(source, number, found.start() + 1)), "use ordinary spaces")


def position(text: str, offset: int, source: str) -> Origin:
    """The origin of a character of a text."""
    return Origin(source, text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset))


def _origin(source: str, mark: Any) -> Origin:
    return Origin(source, mark.line + 1, mark.column + 1) if mark is not None else Origin(source, 1, 1)


def _problem(error: MarkedYAMLError) -> str:
    words = " ".join(str(error.problem or "unreadable").split())
    return f"not valid YAML: {words}" + (f" {error.context}" if error.context else "")


def _events(text: str) -> Iterator[Event]:
    yield from YAML(typ="safe", pure=True).parse(text)


@dataclass
class _Reader:
    """Turns parser events into values; goes on after a fault that leaves the structure readable, to report them all."""

    source: str
    keys: dict[KeyPath, Origin] = field(default_factory=dict)
    values: dict[KeyPath, Origin] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    resolver: Any = field(default_factory=lambda: YAML(typ="safe", pure=True).resolver)

    def document(self, events: Iterator[Event]) -> Any:
        value, documents = None, 0
        for event in events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if event.version or event.tags:
                    self._stop(
                        event, "a YAML directive is not allowed in a recipe", "remove the line that starts with %"
                    )
                if documents > 1:
                    self._stop(event, "a second document starts here", "keep one document: remove the --- line")
            elif isinstance(event, NodeEvent):
                value = self._node(event, events, ())
        return value

    def _node(self, event: Event, events: Iterator[Event], at: KeyPath) -> Any:
        self.values[at] = origin = _origin(self.source, event.start_mark)
        if isinstance(event, AliasEvent):
            return self._fault(event, at, "an alias (*name) is not allowed in a recipe", "write the value out")
        if getattr(event, "anchor", None):
            self._fault(event, at, "an anchor (&name) is not allowed in a recipe", "remove it")
        if getattr(event, "tag", None):
            self._fault(event, at, "a tag (!name) is not allowed in a recipe", "write the plain value")
        if len(at) >= MAX_DEPTH:
            raise RecipeError(f"nested deeper than {MAX_DEPTH} levels", str(origin))
        if isinstance(event, ScalarEvent):
            return self._scalar(event, at)
        if isinstance(event, SequenceStartEvent):
            return [self._node(item, events, (*at, i)) for i, item in enumerate(_children(events))]
        return self._mapping(events, at)

    def _mapping(self, events: Iterator[Event], at: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        children = _children(events)
        for event in children:
            if not isinstance(event, ScalarEvent):
                self._stop(event, "a key must be a word, not a list or mapping", _SYNTAX_FIX)
                continue
            key = event.value
            path = (*at, key)
            if event.tag or getattr(event, "anchor", None) or not isinstance(self._scalar(event, path), str):
                self._fault(event, path, "a key must be a plain word", "rename it")
            if key in mapping:
                first = self.keys[path].line
                self._fault(event, path, f"written twice, first on line {first}", "keep one")
                path = (*at, key, "")  # a place of its own, so that the first one's origins stay
            self.keys[path] = _origin(self.source, event.start_mark)
            value = self._node(next(children), events, path)
            mapping.setdefault(key, value)
        return mapping

    def _scalar(self, event: ScalarEvent, at: KeyPath) -> Any:
        text: str = event.value
        if event.style in ("'", '"') and event.end_mark.line > event.start_mark.line:
            # At once: the parser would stumble much later, over whatever quote it took for the closing one.
            self._stop(event, "quoted text runs over several lines", "close the quote on its own line")
        if event.style is not None:
            return text
        if event.end_mark.line > event.start_mark.line:
            return self._fault(event, at, "plain text runs over several lines", _SYNTAX_FIX)
        tag = self.resolver.resolve(ScalarNode, text, event.implicit)
        kind = str(tag).rpartition(":")[2]
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind in ("int", "float"):
            return self._number(event, at, kind)
        return text

    def _number(self, event: ScalarEvent, at: KeyPath, kind: str) -> Any:
        text: str = event.value
        if "_" in text:
            return self._fault(
                event, at, "a number with _ means different things to different readers", "leave out the _"
            )
        if len(text) > MAX_DIGITS + 6:
            return self._fault(event, at, "a number with more digits than any setting needs", "shorten it")
        try:
            number = int(text, 0) if kind == "int" else float(text)
        except ValueError:
            if kind == "float":
                return self._fault(event, at, "not a finite number", "write a plain number")
            return self._fault(event, at, "a number with leading zeros is octal to some readers", "leave out the zeros")
        if not math.isfinite(number):
            return self._fault(event, at, "not a finite number", "write a plain number")
        return number

    def _fault(self, event: Event, at: KeyPath, what: str, fix: str) -> None:
        where = str(_origin(self.source, event.start_mark))
        key = dotted(at)
        self.faults.append(Fault(what, f"{where}: {key}" if key else where, fix))

    def _stop(self, event: Event, what: str, fix: str) -> None:
        raise RecipeError(what, str(_origin(self.source, event.start_mark)), fix)


def dotted(path: KeyPath) -> str:
    """``("evaluate", "metrics", 0)`` as ``evaluate.metrics[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _children(events: Iterator[Event]) -> Iterator[Event]:
    """The events of one collection up to its end; nested ones are consumed by whoever handles their start."""
    for event in events:
        if not isinstance(event, NodeEvent):
            return
        yield event
