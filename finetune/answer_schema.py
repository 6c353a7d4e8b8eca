"""A JSON schema in a file, as a judge of answers: nothing is fetched, and no pattern in it searches for ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune import pattern

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_NAMES = ("properties", "$defs", "definitions", "dependentSchemas")
"""What holds schemas by names of the user's own choice."""
_PROBES: tuple[Any, ...] = (None, {}, [], "", 0)
"""One value of each kind: a schema that leads in a circle shows on them."""


def load(path: Path) -> Any:
    """The schema's validator. Raises ValueError with what is wrong with the file."""
    import referencing.exceptions
    from jsonschema import exceptions, validators

    try:
        schema = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise ValueError("is not a schema: a schema is an object")
    for word, value in _words(schema):
        if word in _REFERENCES and not str(value).startswith("#"):
            raise ValueError(f"refers to {value!r}: only references within the file (#/…) are followed")
        if word == "patternProperties":
            raise ValueError("has patternProperties, which are not supported: name the properties")
        if word == "pattern" and isinstance(value, str):
            _check_pattern(value)
    kind = validators.validator_for(schema, default=validators.validator_for({}))
    try:
        kind.check_schema(schema)
        _resolve(schema)
        closed: Any = validators.extend(kind, {"pattern": _pattern})(schema, registry=referencing.Registry())
        for probe in _PROBES:
            closed.is_valid(probe)
    except exceptions.SchemaError as error:
        place = "/".join(map(str, error.absolute_path))
        raise ValueError(f"is not a schema: {place + ': ' if place else ''}{error.message}") from None
    except referencing.exceptions.Unresolvable as error:
        raise ValueError(f"refers to {error.ref!r}, which is not in it") from None
    except RecursionError:
        raise ValueError("refers to itself in a circle") from None
    return closed


def holds(schema: Any, text: str) -> bool:
    """Whether a text is JSON, to the letter and whole, and fits the schema. Raises TimeoutError."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        return bool(schema.is_valid(value))
    except (ValueError, RecursionError):
        return False


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _resolve(schema: Any) -> None:
    """Follow every reference once. Raises ``Unresolvable``: the validator would only at the answer that leads there."""
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT202012

    whole = Resource.from_contents(schema, default_specification=DRAFT202012)
    name = whole.id() or ""
    resolver = Registry().with_resource(name, whole).resolver(name)
    for word, value in _words(schema):
        if word == "$ref":
            resolver.lookup(value)


def _check_pattern(value: str) -> None:
    try:
        pattern.compiled(value)
    except ValueError as error:
        raise ValueError(f"has the pattern {value!r}, which cannot be read: {error}") from None


def _pattern(_: Any, wanted: str, instance: Any, schema: Any) -> Iterator[Any]:
    """``pattern``, under the time limit."""
    from jsonschema.exceptions import ValidationError

    if isinstance(instance, str) and not pattern.search(pattern.compiled(wanted), instance):
        yield ValidationError(f"{instance!r} does not match {wanted!r}")


def _words(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every keyword of a schema and those in it, with its value; names that the user chose are none."""
    waiting = [(schema, False)]
    while waiting:
        one, names = waiting.pop()
        if isinstance(one, dict):
            yield from () if names else one.items()
            waiting += [(value, not names and key in _NAMES) for key, value in one.items()]
        elif isinstance(one, list):
            waiting += [(value, False) for value in one]
