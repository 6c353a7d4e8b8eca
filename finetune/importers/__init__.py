"""Other trainers' settings → a recipe: one file each, and the file's name is the word that ``--from`` takes.

Read are YAML and JSON files and the command lines of shell scripts. Nothing in them is run, no variable of the
environment is filled in, nothing is fetched.
"""

from __future__ import annotations

import difflib
import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from finetune import shellscript
from finetune.errors import RecipeError
from finetune.foreign import Draft, Place, Settings
from finetune.recipe import yamlfile
from finetune.shellscript import Command

_MOST = 1_000_000
_DEPTH = 20
_DEVICES = ("NPROC_PER_NODE", "nproc_per_node")
_LEAST_SIGNS = 2
"""Keys of its own that a file must hold to be known for a trainer's."""


class Importer(Protocol):
    """What a file of this folder offers."""

    SIGNS: frozenset[str]
    """Keys that this trainer has, and the others have not, or not all of them together."""

    COMMANDS: tuple[tuple[str, ...], ...]
    """Words that name its program in a script, next to each other; empty where its settings are always a file."""

    def draft(self, settings: Settings) -> Draft:
        """The recipe that has the same meaning; raises RecipeError."""


class _File(NamedTuple):
    """A file of settings: its keys, their lines; trainer, devices and program where a command line names them."""

    values: Mapping[str, Any]
    lines: Mapping[str, int]
    trainer: str = ""
    devices: int | None = None
    program: str = ""


def names() -> tuple[str, ...]:
    """Every trainer there is, in the order of the alphabet."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def get(name: str) -> Importer:
    if name not in names():
        raise RecipeError(f"no importer for {name!r}", "--from", f"one of {', '.join(names())}")
    return cast(Importer, importlib.import_module(f"{__name__}.{name}"))


@cache
def known(name: str) -> tuple[str, ...]:
    """The options of a trainer, or of a part of it: names alone, of the versions that docs/importing.md names."""
    return tuple(json.loads(Path(__file__).with_name("keys.json").read_text(encoding="utf-8"))[name])


def read(path: Path, name: str | None, devices: int | None, place: Place) -> Draft:
    """The draft of a recipe with the meaning of the file at ``path``.

    Raises:
        RecipeError: no such file, not readable, nobody's settings, or settings that contradict each other.
    """
    text = _text(path)
    if path.suffix in (".sh", ".bash") or text.startswith("#!"):
        found = _script(text, path, name)
    elif path.suffix == ".json" or text.lstrip().startswith("{"):
        found = _File(_json(text, path), {})
    else:
        document = yamlfile.load(path)
        lines = {str(at[0]): origin.line for at, origin in document.keys.items() if len(at) == 1}
        found = _File(document.value, lines)
    trainer = name or found.trainer or _whose(found.values, path)
    settings = Settings(
        trainer=trainer, file=path, values=found.values, place=place, lines=found.lines,
        devices=devices or found.devices, program=found.program,
    )  # fmt: skip
    draft = get(trainer).draft(settings)
    settings.refuse()
    return draft


def _text(path: Path) -> str:
    if not path.is_file():
        raise RecipeError("no such file" if not path.exists() else "not a file", str(path))
    with path.open("rb") as stream:
        raw = stream.read(_MOST + 1)
    if len(raw) > _MOST:
        raise RecipeError(f"larger than {_MOST} bytes: these are no settings", str(path))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"byte 0x{raw[error.start]:02x} is not UTF-8", str(path), "save it as UTF-8") from None


def _json(text: str, path: Path) -> dict[str, Any]:
    def closed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
            raise RecipeError("written twice", f"{path}: {twice}", "keep one")
        return made

    def refuse(word: str) -> Any:
        raise RecipeError(f"{word} is not a finite number", str(path), "write a plain number")

    try:
        value = json.loads(text, object_pairs_hook=closed, parse_constant=refuse)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise RecipeError(f"not valid JSON: {error.msg}", where, "mend it there") from None
    except (RecursionError, ValueError):
        raise RecipeError("nested too deep, or a number of too many digits", str(path), "mend it") from None
    if not isinstance(value, dict):
        raise RecipeError("the file must be one object of keys and values", str(path))
    return value


def _script(text: str, path: Path, name: str | None) -> _File:
    """The one command of the script that trains, its arguments as keys."""
    found = [
        (trainer, command, end)
        for command in shellscript.commands(text, path)
        for trainer in ([name] if name else names())
        if (end := _program(command, get(trainer).COMMANDS))
    ]
    if not found:
        whose = (
            f"of {name}"
            if name
            else "that is known here (swift sft, finetune.py, trl sft, trl dpo, llamafactory-cli train)"
        )
        raise RecipeError(f"the script has no training command {whose}", str(path), "name the file of settings itself")
    if len(found) > 1:
        lines = ", ".join(str(command.line) for _, command, _ in found)
        raise RecipeError(f"the script trains more than once (lines {lines})", str(path), "keep one command in it")
    trainer, command, end = found[0]
    values = _arguments(command, end, path, known(trainer))
    if not values and len(command.words) > end:
        fix = f"name it: finetune import {command.words[end]}"
        raise RecipeError("the command takes its settings from a file", f"{path}:{command.line}", fix)
    program = Path(command.words[end - 1]).stem
    return _File(values, dict.fromkeys(values, command.line), trainer, _devices(command, path), program)


def _program(command: Command, programs: tuple[tuple[str, ...], ...]) -> int:
    """Where the arguments begin, behind the words that name the program; 0 where it is another command."""
    for program in programs:
        size = len(program)
        for at in range(len(command.words) - size + 1):
            first, *rest = command.words[at : at + size]
            if Path(first).name == program[0] and tuple(rest) == program[1:]:
                return at + size
    return 0


def _devices(command: Command, path: Path) -> int | None:
    words = [*command.words, ""]
    given = [words[at + 1] for at, word in enumerate(words[:-1]) if word.replace("-", "_") == "__nproc_per_node"]
    given += [word.partition("=")[2] for word in words if word.replace("-", "_").startswith("__nproc_per_node=")]
    given += [command.variables[key] for key in _DEVICES if key in command.variables]
    if given and given[0].isdecimal() and 0 < int(given[0]) <= 100_000:
        return int(given[0])
    if not given and "torchrun" not in command.words:
        return 1
    return None


def _arguments(command: Command, begin: int, path: Path, legal: Sequence[str]) -> dict[str, Any]:
    """``--key value``, ``--key=value``, ``--key`` alone (true), ``--key a b`` (a list); the last of a key counts."""
    values: dict[str, Any] = {}
    key, given = "", list[str]()
    for word in [*command.words[begin:], "--"]:
        if not word.startswith("--"):
            if key:
                given.append(word)
            continue
        if key:
            values[key] = _value(key, given, path, command.line)
        key, sign, first = word[2:].partition("=")
        key = _whole(key.replace("-", "_"), legal)
        given = [first] if sign else []
    return values


def _whole(key: str, legal: Sequence[str]) -> str:
    """argparse takes the beginning of a name for the name, where only one begins so."""
    longer = [name for name in legal if name.startswith(key)] if key and key not in legal else []
    return longer[0] if len(longer) == 1 else key


def _value(key: str, given: list[str], path: Path, line: int) -> Any:
    for word in given:
        if missing := shellscript.unknown(word):
            fix = "write the value into the script: nothing is run, and the environment is not read"
            raise RecipeError(f"only a shell knows what {missing} is", f"{path}:{line}: {key}", fix)
    if not given:
        return True
    return given[0] if len(given) == 1 else list(given)


def _whose(values: Mapping[str, Any], path: Path) -> str:
    signs = {name: len(get(name).SIGNS & set(values)) for name in names()}
    most = max(signs.values())
    best = [name for name, count in signs.items() if count == most]
    if most < _LEAST_SIGNS or len(best) > 1:
        none = "its keys fit no trainer that is known here"
        what = none if most < _LEAST_SIGNS else f"its keys fit {', '.join(best)}"
        raise RecipeError(what, str(path), f"say which it is: --from {'|'.join(names())}")
    return best[0]


def near(word: str, legal: Sequence[str]) -> str:
    """``did you mean 'x'?``, or nothing."""
    found = difflib.get_close_matches(word, legal, n=1, cutoff=0.6)
    return f"did you mean {found[0]!r}?" if found else ""
