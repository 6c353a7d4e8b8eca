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

    def matches(self, row: Row) -> bool:
        """Whether the row's columns are this format's; says nothing about what is in them."""

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
    """The name of the one format whose columns the row has; RowFault when there is none, or more than one."""
    fitting = [name for name in names() if get(name).matches(row)]
    if len(fitting) == 1:
        return fitting[0]
    columns = ", ".join(map(shown, row)) or "none"
    if fitting:
        raise RowFault(
            "columns",
            f"fit several formats ({', '.join(fitting)})",
            "set data.format to the one meant",
            code="ambiguous_format",
        )
    wanted = "; ".join(f"{name}: {get(name).COLUMNS}" for name in names())
    raise RowFault(
        "columns",
        f"no format has these columns ({columns})",
        f"rename them to those of a format ({wanted})",
        code="unknown_format",
    )
