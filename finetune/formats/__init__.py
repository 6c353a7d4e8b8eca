"""Data formats: one file each, and the file's name is the word that a recipe's ``data.format`` uses."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, cast

from finetune.conversation import Conversation, RowFault, nearest, shown
from finetune.errors import DataError

Row = Mapping[str, Any]


class Format(Protocol):
    """What a file of this folder offers."""

    COLUMNS: str
    """The columns it reads, in words, for messages."""

    def columns(self, row: Row) -> dict[str, str]:
        """The row's columns that it would read → what they become; empty where the row is not of this format.

        Says nothing about what is in them.
        """

    def read(self, row: Row) -> Conversation:
        """The row as a conversation; raises RowFault."""


def names() -> tuple[str, ...]:
    """Every format there is, in the order of the alphabet."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(name: str) -> Format:
    """The format of that name; DataError when there is none."""
    if name not in names():
        raise DataError(f"unknown data format {shown(name)}", "data.format", nearest(name, names()))
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))


def detect(row: Row) -> str:
    """The name of the format that reads most of the row's columns; RowFault when there is none, or no single one."""
    read = {name: len(get(name).columns(row)) for name in names()}
    most = max(read.values())
    fitting = [name for name, count in read.items() if count == most]
    if most and len(fitting) == 1:
        return fitting[0]
    columns = ", ".join(map(shown, row)) or "none"
    if most:
        what = f"fit several formats ({', '.join(fitting)})"
        raise RowFault("columns", what, "set data.format to the one meant", code="ambiguous_format")
    wanted = "; ".join(f"{name}: {get(name).COLUMNS}" for name in names())
    what = f"no format has these columns ({columns})"
    fix = f"name them in data.columns, or rename them to those of a format ({wanted})"
    raise RowFault("columns", what, fix, code="unknown_format")


def mapping(name: str, row: Row) -> str:
    """In words, what becomes of the row's columns: ``chat: messages → turns; not read: id``."""
    read = get(name).columns(row)
    text = f"{name}: {', '.join(f'{shown(column)} → {what}' for column, what in read.items()) or 'nothing'}"
    unread = [shown(column) for column in row if column not in read]
    return f"{text}; not read: {', '.join(unread)}" if unread else text
