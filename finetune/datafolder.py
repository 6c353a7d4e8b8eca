"""A folder that holds a data set: files by the conventions of ``datasets``, or what its ``save_to_disk`` wrote.

Nothing in the folder is run, nothing is written into it, and no name in it leads out of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import posixpath
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from finetune.errors import DataError
from finetune.terminal import clean

_KINDS = {".jsonl": "JSON", ".json": "JSON", ".csv": "CSV", ".parquet": "Parquet"}
"""Suffix → kind of file; the suffixes are those that ``records`` reads."""
_SPLIT = re.compile(r"\w+(\.\w+)*", re.ASCII)
_AGAIN = "save it again with save_to_disk"
_DICT, _STATE, _INFO = "dataset_dict.json", "state.json", "dataset_info.json"


def files(folder: Path, split: str, subset: str | None = None) -> list[Path]:
    """The data files of one split, in a fixed order, by the conventions of ``datasets``: names such as
    ``train.jsonl``, ``validation/part.csv``, ``data/train-00000-of-00002.parquet``, or the README's ``configs``.
    Files that name no split are ``train``.

    Args:
        subset: one of the README's ``configs``.

    Raises:
        DataError: no such split or subset, no data file, or one split in two kinds of file.
    """
    found = _found(folder, subset)
    if not found:
        what = "there is no data file in this folder"
        raise DataError(what, str(folder), f"put files here whose names end in {' '.join(_KINDS)} (or .gz after that)")
    if split not in found:
        no_split(split, list(found), str(folder))
    first: dict[str, str] = {}
    kind = _kind(found[split][0])
    for name in found[split]:
        other = first.setdefault(_stem(name), name)
        if other != name or _kind(name) != kind:
            what = f"{name} and {other if other != name else found[split][0]} may be the same rows in two forms"
            raise DataError(what, str(folder), "keep one form, or name the files one by one")
    return [folder / name for name in found[split]]


def stored(folder: Path) -> bool:
    """Whether ``save_to_disk`` of ``datasets`` wrote this folder."""
    return (folder / _DICT).is_file() or ((folder / _STATE).is_file() and (folder / _INFO).is_file())


def rows(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a folder that ``stored`` knows, from the disk as they are asked for. Media stay encoded. Rows that
    were saved without a split's name are ``train``.

    Raises:
        DataError: no such split, or a file that cannot be read; in the midst of the rows it names the row reached.
    """
    import datasets

    where = f"{folder}, split {clean(split)}"
    try:
        many = (folder / _DICT).is_file()
        state = json.loads((folder / (_DICT if many else _STATE)).read_bytes())
        names = list(filter(_SPLIT.fullmatch, state["splits"])) if many else [state["_split"] or "train"]
        if split not in names:
            no_split(split, names, str(folder))
        saved = datasets.load_from_disk(str(folder / split if many else folder))
        dataset = encoded(saved.with_format(None).to_iterable_dataset())
    except unreadable() as error:
        raise DataError(f"cannot be read: {said(error)}", where, _AGAIN) from None
    return _rows(dataset, where)


def _rows(dataset: Any, where: str) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        for row in dataset:
            yield row
            number += 1
    except unreadable() as error:
        raise DataError(f"cannot be read: {said(error)}", f"{where}, after row {number}", _AGAIN) from None


def no_split(split: str, names: list[str], where: str) -> NoReturn:
    raise DataError(f"there is no split {clean(split)}", where, f"name one of these: {clean(', '.join(names))}")


def _found(folder: Path, subset: str | None) -> dict[str, list[str]]:
    """Split → names of its data files, as the README's ``configs`` or the names themselves say."""
    config = _config(folder / "README.md", subset)
    inside = f"{posixpath.normpath(config['data_dir'])}/" if config.get("data_dir") else ""
    names = [name.removeprefix(inside) for name in _names(folder) if name.startswith(inside)]
    found = _by_patterns(names, config["data_files"]) if config.get("data_files") else _by_names(names)
    return {split: [inside + name for name in named] for split, named in found.items() if named}


def _names(folder: Path) -> list[str]:
    """The data files in the folder and below it, by their names from there; hidden ones and descriptions are none."""
    from datasets.data_files import FILES_TO_IGNORE

    names = []
    try:
        for above, folders, here in os.walk(folder, onerror=_refuse):
            folders[:] = [name for name in folders if not name.startswith((".", "__"))]
            plain = (name for name in here if not name.startswith(".") and name not in FILES_TO_IGNORE)
            names += [(Path(above) / name).relative_to(folder).as_posix() for name in plain if _kind(name)]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", str(folder), "check the folder and its rights") from None
    return sorted(names)


def _refuse(error: OSError) -> NoReturn:
    raise error


def _kind(name: str) -> str:
    return _KINDS.get(Path(name.lower().removesuffix(".gz")).suffix, "")


def _stem(name: str) -> str:
    return str(Path(name.removesuffix(".gz")).with_suffix(""))


def _by_names(names: list[str]) -> dict[str, list[str]]:
    from datasets.data_files import ALL_DEFAULT_PATTERNS, SPLIT_PATTERN_SHARDED

    sharded = _by_patterns(names, {"": SPLIT_PATTERN_SHARDED.replace("{split}", "*")})[""]
    splits = {posixpath.basename(name).rpartition("-of-")[0].rpartition("-")[0] for name in sharded}
    if splits:
        return _by_patterns(names, {split: SPLIT_PATTERN_SHARDED.format(split=split) for split in sorted(splits)})
    for patterns in ALL_DEFAULT_PATTERNS:
        found = _by_patterns(names, patterns)
        if any(found.values()):
            return found
    return {}


def _by_patterns(names: list[str], wanted: Any) -> dict[str, list[str]]:
    """``wanted``: split → patterns, in any of the forms that ``datasets`` allows. It matches by the same rule; but a
    pattern that leads out of the folder or to another machine finds nothing here."""
    from datasets.data_files import sanitize_patterns
    from fsspec.utils import glob_translate

    found = {}
    for split, patterns in sanitize_patterns(wanted).items():
        rules = [re.compile(glob_translate(posixpath.normpath(pattern))) for pattern in patterns]
        found[str(split)] = [name for name in names if any(rule.match(name) for rule in rules)]
    return found


def _config(readme: Path, subset: str | None) -> dict[str, Any]:
    """The README's entry of a subset; empty where there are no subsets and none is asked for."""
    from datasets.utils.metadata import MetadataConfigs
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = readme.read_text(encoding="utf-8-sig") if readme.is_file() else ""
        head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        card = YAML(typ="safe", pure=True).load(head[1]) if head else {}
        configs = MetadataConfigs.from_dataset_card_data(card if isinstance(card, dict) else {})
        name = subset or configs.get_default_config_name()
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        what = f"its head cannot be read: {clean(str(error), 300)}"
        raise DataError(what, str(readme), "mend the head, or remove it") from None
    if not configs and subset is None:
        return {}
    if name not in configs:
        _no_subset(subset, list(configs), str(readme.parent))
    return dict(configs[name])


def _no_subset(subset: str | None, names: list[str], where: str) -> NoReturn:
    what = f"there is no subset {clean(subset)}" if subset else "there are several subsets, and none is the default"
    fix = f"name one of these: {clean(', '.join(names), 500)}" if names else "leave the subset out"
    raise DataError(what, where, fix)


def encoded(dataset: Any) -> Any:
    """A stream of ``datasets`` whose images and other media come as the bytes they are: decoding them takes packages
    and time, and no row of text needs it. JSON values are none of these: undecoded they would be texts."""
    from datasets import Features

    if dataset.features is None:
        return dataset
    plain = Features({name: _plain(feature) for name, feature in dataset.features.items()})
    return dataset if plain == dataset.features else dataset.cast(plain)


def _plain(feature: Any) -> Any:
    from datasets import Json

    if isinstance(feature, dict):
        return {name: _plain(inner) for name, inner in feature.items()}
    if dataclasses.is_dataclass(feature) and not isinstance(feature, type):
        if hasattr(feature, "feature"):
            return dataclasses.replace(feature, feature=_plain(feature.feature))
        if getattr(feature, "decode", False) and not isinstance(feature, Json):
            return dataclasses.replace(feature, decode=False)
    return feature


def unreadable(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What ``datasets`` raises at contents that it cannot read."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    plain = (OSError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, EOFError, zlib.error)
    return (ArrowException, DatasetsError, *plain, *more)


def said(error: BaseException) -> str:
    """The reason that lies deepest, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return clean(str(error) or type(error).__name__, 300)
