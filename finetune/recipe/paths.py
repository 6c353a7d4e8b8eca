"""What a recipe's paths and names may look like, and whether the files they name are there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune import known_models
from finetune.recipe.words import Finding, did_you_mean, near_path, nearest, shown
from finetune.recipe.yamlfile import KeyPath

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[A-Za-z][A-Za-z0-9+.-]*:/?/?[^/\\]*@")
_PLACE = re.compile(r"[a-z][a-z0-9+.-]*://(?!.*::)\S.*")
_SECRET = re.compile(r"[^:]*://[^/@]*:[^/@]*@|.*\?")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_DATA_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".txt", ".yaml", ".yml")
_PART_CHARACTERS = 96
TRACKIO = "trackio"
"""The folder beside the runs in which that tracker keeps what it records."""
_PART_BYTES = 255  # what file systems take for one name


def check(tree: dict[str, Any]) -> Iterator[Finding]:
    """Faults of ``model``, ``data.*_path`` and ``output``; values of a wrong type are somebody else's to report."""
    if isinstance(model := tree.get("model"), str):
        yield from _model(model)
    adapter = tree.get("adapter")
    if isinstance(adapter, dict) and isinstance(start := adapter.get("start_from"), str):
        yield from _start(("adapter", "start_from"), start, tree.get("output"))
    aim = tree.get("objective")
    if isinstance(aim, dict) and isinstance(teacher := aim.get("teacher"), str):
        yield from _start(("objective", "teacher"), teacher, tree.get("output"))
    data = tree.get("data")
    paths = data if isinstance(data, dict) else {}
    for key in ("train_path", "eval_path"):
        if isinstance(path := paths.get(key), str):
            yield from _rows(("data", key), path)
    sources = paths.get("sources")
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source, dict) and isinstance(path := source.get("path"), str):
            yield from _rows(("data", "sources", index, "path"), path)
            yield from _same_file(path, paths.get("eval_path"))
    yield from _same_file(paths.get("train_path"), paths.get("eval_path"))
    train = tree.get("train")
    if isinstance(train, dict) and isinstance(url := train.get("copy_to"), str):
        yield from _copy_to(url, several=tree.get("adapters") is not None)
    if isinstance(output := tree.get("output"), str):
        yield from _output(output)


def _copy_to(url: str, *, several: bool) -> Iterator[Finding]:
    at: KeyPath = ("train", "copy_to")
    if any(_control(url)):
        yield Finding(at, f"holds a control character: {shown(url)}", "remove it")
    elif not _PLACE.fullmatch(url):
        yield Finding(
            at, f"{shown(url)} is not the URL of a folder", "write it as s3://bucket/runs or file:///mnt/runs"
        )
    elif _SECRET.match(url):
        what = "holds a password or a signature, which every copy of the recipe would carry along"
        yield Finding(at, what, "take it out: the environment's own variables (AWS_…, GOOGLE_…, AZURE_…) are used")
    elif several:
        yield Finding(at, "is for single runs", "remove it, or train the adapters one by one")


def _model(name: str) -> Iterator[Finding]:
    at: KeyPath = ("model",)
    if _URL.match(name):
        yield Finding(at, "a URL is not accepted", "name a folder or a known model")
    elif any(_control(name)):
        yield Finding(at, f"holds a control character: {shown(name)}", "remove it")
    elif not _is_dir(name) and known_models.find(name) is None and not _is_hub_id(name):
        fix = near_path(Path(name)) if os.sep in name else ""
        known = known_models.names()
        if nearest(name, known) is not None or not fix:
            fix = did_you_mean(name, known)
        yield Finding(at, f"{shown(name)} is neither a folder nor a known model", fix)


def _is_hub_id(name: str) -> bool:
    """``owner/name``, unless it is a slip in the name of a known model or of a path whose first part is there."""
    owner, _, _ = name.partition("/")
    return _HUB_ID.fullmatch(name) is not None and not _is_dir(owner) and nearest(name, known_models.names()) is None


def _rows(at: KeyPath, name: str) -> Iterator[Finding]:
    """A file, a folder, or a data set's id on the hub."""
    if not name:
        yield Finding(at, "the path is empty", "name a file, a folder, or a data set's id on the hub")
    elif _URL.match(name):
        yield Finding(at, "a URL is not accepted", "fetch the file first and name it here")
    elif any(_control(name)):
        yield Finding(at, f"holds a control character: {shown(name)}", "remove it")
    elif name.startswith("~"):
        yield Finding(at, "~ is not expanded", "write the path out")
    elif _is_dir(name) or is_data_id(name):
        return
    elif not os.path.isfile(name):  # noqa: PTH113 - false, not an error, for a name too long for the file system
        yield Finding(at, f"no such file: {shown(name)}", _near(name))


def _start(at: KeyPath, name: str, output: object) -> Iterator[Finding]:
    """A folder; what it holds is asked where a run begins from it or learns from it."""
    if not name:
        yield Finding(at, "the path is empty", "name a finished run's folder")
    elif _URL.match(name):
        yield Finding(at, "a URL is not accepted", "fetch it first and name its folder here")
    elif any(_control(name)):
        yield Finding(at, f"holds a control character: {shown(name)}", "remove it")
    elif isinstance(output, str) and os.path.normpath(name) == os.path.normpath(output):
        yield Finding(at, "is the run's own output", "name another run, or give this one another output")


def is_data_id(name: str) -> bool:
    """``owner/name``, unless that looks like a file, or its first part is a folder here."""
    owner, _, last = name.partition("/")
    return _HUB_ID.fullmatch(name) is not None and not _is_dir(owner) and not last.lower().endswith(_DATA_ENDINGS)


def _same_file(train: object, judge: object) -> Iterator[Finding]:
    if not isinstance(train, str) or not isinstance(judge, str) or not train or not judge:
        return
    if _is_dir(train) or is_data_id(train):
        return  # its splits are other rows
    try:
        same = os.path.samefile(train, judge)  # noqa: PTH121 - links count too
    except (OSError, ValueError):
        same = os.path.normpath(train) == os.path.normpath(judge)
    if same:
        yield Finding(("data", "eval_path"), "is the file that is trained on", "hold rows out with eval_fraction")


def _output(name: str) -> Iterator[Finding]:
    at: KeyPath = ("output",)
    if not name:
        yield Finding(at, "the path is empty", "name the run folder")
        return
    if _URL.match(name):
        yield Finding(at, "a URL is not accepted", "name a folder")
        return
    parts = name.removeprefix("/").removesuffix("/").split("/")
    if ".." in parts:
        yield Finding(at, "must not contain ..", "write the path out")
    elif bad := next((part for part in _new(name, parts) if not _is_plain(part)), None):
        what = f"{shown(bad)} is not a usable folder name"
        yield Finding(at, what, f"use letters, digits and any of ._-=, at most {_PART_CHARACTERS} of them")
    elif "" in parts or set(parts) == {"."}:
        yield Finding(at, f"{shown(name)} does not name a folder of its own", "write it like runs/name")
    elif parts[-1] == TRACKIO:
        yield Finding(at, "the tracker trackio keeps what it records of runs here", "give it another name")


def _new(name: str, parts: list[str]) -> list[str]:
    """The folders that would be made: those that are there already may be called as they are."""
    root = "/" if name.startswith("/") else ""
    there = 0
    while there < len(parts) - 1 and _is_dir(root + "/".join(parts[: there + 1])):
        there += 1
    return parts[there:]


def _is_plain(part: str) -> bool:
    legal = all(one in "._-=," or (one.isalnum() and (one.isascii() or one.isalpha())) for one in part)
    return legal and len(part) <= _PART_CHARACTERS and len(part.encode()) <= _PART_BYTES


def _near(name: str) -> str:
    try:
        return near_path(Path(name))
    except OSError:
        return ""


def _is_dir(name: str) -> bool:
    return bool(name) and os.path.isdir(name)  # noqa: PTH112 - false, not an error, for an impossible name


def _control(text: str) -> Iterator[bool]:
    return (not one.isprintable() for one in text)
