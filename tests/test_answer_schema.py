"""A schema as a judge: what it lets through, what is refused of it, and that nothing is fetched."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from finetune import answer_schema

TREE = {"$defs": {"node": {"type": "object", "required": ["v"], "properties": {"v": {"type": "integer"},
        "next": {"$ref": "#/$defs/node"}}}}, "$ref": "#/$defs/node"}  # fmt: skip


def write(folder: Path, schema: Any) -> Path:
    (folder / "schema.json").write_text(schema if isinstance(schema, str) else json.dumps(schema))
    return folder / "schema.json"


def test_references_within_the_file_are_followed(tmp_path: Path) -> None:
    schema = answer_schema.load(write(tmp_path, TREE))
    assert answer_schema.holds(schema, '{"v": 1, "next": {"v": 2}}')
    assert not answer_schema.holds(schema, '{"v": 1, "next": {"v": "2"}}')


def test_properties_may_be_called_like_keywords(tmp_path: Path) -> None:
    named = {"properties": {name: {"type": "string"} for name in ("$ref", "pattern", "patternProperties", "type")}}
    schema = answer_schema.load(write(tmp_path, named))
    assert answer_schema.holds(schema, '{"pattern": "(", "$ref": "x"}')
    assert not answer_schema.holds(schema, '{"pattern": 1}')


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("{", "is not JSON"),
        ([1], "is not a schema"),
        ({"type": "objekt"}, "is not a schema: type"),
        ({"properties": {"a": {"minimum": "1"}}}, "properties/a/minimum"),
        ({"$ref": "https://example.org/s.json"}, "only references within the file"),
        ({"$ref": "other.json"}, "only references within the file"),
        ({"properties": {"a": {"$ref": "#/$defs/gone"}}}, "which is not in it"),
        ({"$ref": "#"}, "in a circle"),
        ({"pattern": "("}, "cannot be read"),
        ({"patternProperties": {"^a": {}}}, "patternProperties"),
    ],
)
def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: Any, said: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ValueError, match=said.replace("$", r"\$")):
        answer_schema.load(write(tmp_path, schema))


def test_a_pattern_that_would_search_for_ever_is_stopped(tmp_path: Path) -> None:
    schema = answer_schema.load(write(tmp_path, {"pattern": "^(?:a|aa)+$"}))
    assert answer_schema.holds(schema, '"aaa"')
    with pytest.raises(TimeoutError):
        answer_schema.holds(schema, json.dumps("a" * 60 + "!"))
