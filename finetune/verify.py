"""Does a release hold? Every byte of its folder is judged. Imports the standard library alone, so it can be handed on.

    python -m finetune.verify DIR          or a copy of this file: python verify.py DIR

Exit codes: 0 it holds, 1 it does not (each file is named), 4 no release, 5 the folder cannot be opened.
A release is a folder with

    weights, tokenizer, card …   its payload
    manifest.json                sha-256 of each payload file, and where the model comes from
    model.sig                    if signed: a signature over payload and manifest.json, in the form of model-signing
    SHA256SUMS                   sha-256 of every other file, model.sig among them

The signature is made first and SHA256SUMS last, because then a damaged signature is found without any key; were
SHA256SUMS signed, nothing would hold the digest of the signature. SHA256SUMS itself needs no digest: its text follows
from the other files and is compared byte for byte. Digests find accidents. An attacker can write new ones, and only a
signature checked against a key that came another way finds that.

Not content, and not judged: modes, times, attributes, and ``.cache/huggingface``, where the hub's client keeps notes in
a folder that it has downloaded to; no program loads a model from there. Links, devices and folders without files are
faults, for nothing covers them. A receiver without this file has ``sha256sum --strict -c SHA256SUMS``, run in the
folder; it sees every damaged and missing file, and no additional one. For the signature, see signature.py.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

MANIFEST, SIGNATURE, SUMS = "manifest.json", "model.sig", "SHA256SUMS"
OURS = {MANIFEST, SIGNATURE, SUMS}
FORMAT = 1
LIMIT = 16 * 1024**2
"""Bytes of manifest.json, of SHA256SUMS and of model.sig that are read at most."""

_BLOCK = 1024**2
_THREADS = 8
_HEX = re.compile(r"[0-9a-f]{64}")
NOTES = ".cache/huggingface"
_LINE = re.compile(r"(\\?)([0-9a-f]{64})  (.+)", re.DOTALL)


class NoRelease(Exception):  # noqa: N818 — an answer, as StopIteration is
    """This folder is no release at all."""


def faults(folder: Path, progress: Callable[[int], None] = lambda count: None) -> list[str]:
    """What does not hold, each with the file's name; empty where every byte is as it was released.

    ``progress`` is told the bytes of each block read, from several threads.

    Raises:
        NoRelease: neither manifest.json nor SHA256SUMS is a release's.
        OSError: the folder itself cannot be opened.
    """
    if not folder.is_dir():
        raise NoRelease("there is no such folder")
    names, found = listing(folder)
    recorded, why_not_recorded = _stored(folder, MANIFEST, names, _recorded)
    listed, why_not_listed = _stored(folder, SUMS, names, listed_in)
    if recorded is None and listed is None:
        raise NoRelease(f"{why_not_recorded}; {why_not_listed}")
    found += filter(None, [why_not_recorded, why_not_listed])

    actual, unreadable = digests(folder, [name for name in names if name != SUMS], progress)
    found += unreadable
    if recorded is None:
        recorded = {name: digest for name, digest in (listed or {}).items() if name not in OURS}
    if listed is None:  # of our own files nothing is known then, so they pass here; that SHA256SUMS is bad is said
        listed = recorded | {name: actual[name] for name in OURS & set(actual)}
    for name in sorted({*actual, *recorded, *listed}):
        found.append(_judged(name, actual.get(name), recorded.get(name), listed.get(name)) or "")
    return [fault for fault in dict.fromkeys(found) if fault]


def _judged(name: str, actual: str | None, recorded: str | None, listed: str | None) -> str | None:
    """One file against what manifest.json recorded and SHA256SUMS lists of it. Unreadable, it is "" and was named."""
    named = shown(name)
    if name in OURS:
        recorded = listed
    if actual == "" or actual == recorded == listed:
        return None
    if actual is None:
        return f"{named} is missing"
    if recorded is None and listed is None:
        return f"{named} was added: neither {MANIFEST} nor {SUMS} knows it"
    if recorded is None or listed is None:
        return f"{named} is not in {MANIFEST if recorded is None else SUMS}"
    if name in OURS:
        return f"{named} is damaged, or its line in {SUMS} is: the digest differs"
    if actual in (recorded, listed):
        return f"{SUMS if actual == recorded else MANIFEST} is damaged: it has another digest for {named}"
    return f"{named} is damaged: its digest differs"


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """The files below ``folder`` by their path in it, as spelled on disk, and a fault for whatever else is there.

    Raises:
        OSError: the folder itself cannot be opened.
    """
    names: list[str] = []
    found: list[str] = []
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(folder / below) as entries:
                here = [(f"{below}/{entry.name}" if below else entry.name, _kind(entry)) for entry in entries]
        except OSError as error:
            if not below:
                raise
            found.append(f"{shown(below)} cannot be read: {_reason(error)}")
            continue
        if below and not here:
            found.append(f"{shown(below)} is a folder without files")
        waiting += [name for name, kind in here if kind == "folder" and name != NOTES]
        names += [name for name, kind in here if kind == "file"]
        found += [f"{shown(name)} is {kind}" for name, kind in here if kind not in ("folder", "file")]
    return sorted(names), sorted(found)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "a symbolic link, not a file"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "file" if entry.is_file(follow_symlinks=False) else "neither a file nor a folder"


def digests(
    folder: Path, names: Iterable[str], progress: Callable[[int], None] = lambda count: None
) -> tuple[dict[str, str], list[str]]:
    """The sha-256 of each file, and a fault for each that cannot be read (its digest is "").

    Files are read in blocks, several at once; an interrupt ends all of them at their next block.
    """
    wanted, stop = list(names), threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    try:
        answers = list(pool.map(lambda name: _digest(folder / name, stop, progress), wanted))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    found = [
        f"{shown(name)} cannot be read: {_reason(answer)}"
        for name, answer in zip(wanted, answers, strict=True)
        if isinstance(answer, OSError)
    ]
    return {name: a if isinstance(a, str) else "" for name, a in zip(wanted, answers, strict=True)}, found


def _digest(path: Path, stop: threading.Event, progress: Callable[[int], None]) -> str | OSError:
    total = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while not stop.is_set() and (block := file.read(_BLOCK)):
                total.update(block)
                progress(len(block))
    except OSError as error:
        return error
    return total.hexdigest()


def _stored(
    folder: Path, name: str, names: Sequence[str], parse: Callable[[bytes], dict[str, str]]
) -> tuple[dict[str, str] | None, str | None]:
    """The digests in one of our own files, or why there are none."""
    if name not in names:
        return None, f"{name} is missing"
    try:
        return parse(bounded(folder / name)), None
    except OSError as error:
        return None, f"{name} cannot be read: {_reason(error)}"
    except (ValueError, RecursionError) as error:
        return None, f"{name} is damaged: {shown(str(error))}"


def bounded(path: Path) -> bytes:
    """The whole of a small file. Raises ValueError where it is larger than ours may be."""
    with path.open("rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise ValueError(f"it is larger than {LIMIT // 1024**2} MiB")
    return data


def _recorded(data: bytes) -> dict[str, str]:
    """What manifest.json says of the payload: file → sha-256. Raises ValueError with what is wrong."""
    stored = json.loads(data, object_pairs_hook=_without_repeats)
    if not isinstance(stored, dict) or "release" not in stored or not isinstance(stored.get("sha256"), dict):
        raise ValueError("it is not the manifest of a release")
    if stored["release"] != FORMAT:
        raise ValueError(f"it has format {stored['release']!r:.20}, and only {FORMAT} is known here")
    for name, digest in stored["sha256"].items():
        _check_entry(name, digest, OURS)
    return dict(stored["sha256"])


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise ValueError(f"it names {counts.most_common(1)[0][0]!r:.80} twice")
    return made


def _check_entry(name: str, digest: Any, own: set[str]) -> None:
    if any(part in ("", ".", "..") for part in name.split("/")) or {"\0", "\r"} & set(name):
        raise ValueError(f"it names {name!r:.80}, which is no path inside the folder")
    if name in own:
        raise ValueError(f"it names {name}, which is no payload")
    if not isinstance(digest, str) or not _HEX.fullmatch(digest):
        raise ValueError(f"what it has for {name!r:.80} is no sha-256")


def listed_in(data: bytes) -> dict[str, str]:
    """What SHA256SUMS lists: file → sha-256. Raises ValueError where it is not exactly as ``sums`` writes it."""
    found: dict[str, str] = {}
    for number, line in enumerate(data.decode().split("\n")[:-1], 1):
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise ValueError(f"line {number} is not as sha256sum writes it")
        name = parts[3]
        if parts[1]:
            name = re.sub(r"\\(.)", lambda escape: {"n": "\n", "\\": "\\"}.get(escape[1], ""), name)
        _check_entry(name, parts[2], {SUMS})
        found[name] = parts[2]
    if sums(found) != data:
        raise ValueError("its lines are not in order, repeated, cut off or written otherwise")
    if MANIFEST not in found:
        raise ValueError(f"it does not list {MANIFEST}")
    return found


def sums(digests: Mapping[str, str]) -> bytes:
    """The one text of SHA256SUMS for these files: by name, in the form of coreutils, which escapes \\ and newlines."""
    lines = []
    for name in sorted(digests):
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
        lines.append(f"{'' if escaped == name else chr(92)}{digests[name]}  {escaped}\n")
    return "".join(lines).encode(errors="surrogateescape")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def shown(text: str) -> str:
    """``text`` for a terminal: nothing in a file's name can move the cursor or break a line."""
    return text if text.isprintable() else ascii(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="verify", description="Check every byte of a release.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    try:
        found = faults(folder)
    except NoRelease as error:
        sys.stderr.write(f"no release: {shown(str(folder))}: {error}\n")
        return 4
    except OSError as error:
        sys.stderr.write(f"environment: {shown(str(folder))}: {_reason(error)}\n")
        return 5
    for fault in found:
        sys.stderr.write(f"{fault}\n")
    if not found:
        sys.stdout.write("every file holds; a signature was not checked\n")
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
