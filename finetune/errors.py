"""What can go wrong, one class per exit code.

    FinetuneError          1  a check that was asked for did not hold
    ├── RecipeError        2  the recipe: carries every fault found in it
    ├── DataError          3  a data file or one of its rows
    ├── ModelError         4  a model folder or an adapter
    ├── EnvironmentFault   5  the machine: disk, memory, missing package, folder in use
    └── Interrupted        6  stopped on request; the same command goes on

Raised where the fact is known; only ``cli.py`` prints one and turns it into an exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Fault(NamedTuple):
    """One thing that is wrong: ``where`` is ``file:line:column: key``, a row, a tensor or a path."""

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.fix}" if self.fix else text


class FinetuneError(Exception):
    """A coded failure: what is wrong, where, and what to do about it."""

    exit_code = 1
    label = "check failed"

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.faults: tuple[Fault, ...] = (Fault(what, where, fix),)
        super().__init__(str(self.faults[0]))

    @classmethod
    def of(cls, faults: Sequence[Fault]) -> FinetuneError:
        """One error that carries several faults, so that a user mends them all at once."""
        error = cls(*faults[0])
        error.faults = tuple(faults)
        error.args = ("\n".join(map(str, faults)),)
        return error


class RecipeError(FinetuneError):
    exit_code = 2
    label = "recipe"


class DataError(FinetuneError):
    exit_code = 3
    label = "data"


class ModelError(FinetuneError):
    exit_code = 4
    label = "model"


class EnvironmentFault(FinetuneError):  # noqa: N818 — EnvironmentError is a builtin
    exit_code = 5
    label = "environment"


class Interrupted(FinetuneError):  # noqa: N818 — an event, as KeyboardInterrupt is
    """Stopped on request with nothing lost; the same command, or call, goes on."""

    exit_code = 6
    label = "interrupted"
