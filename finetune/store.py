"""Rows as ids on disk, kept by content: written once, mapped into memory, however many there are.

A store's name is a digest of everything that its content depends on: the data's bytes, how they are read, the
tokenizer, its template, the window and this package's own code. A changed byte makes another store; the same ones are
found again in the time it takes to verify them. A store appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from filelock import FileLock

from finetune import __version__, dataset, manifest, samples
from finetune.conversation import RowFault
from finetune.dataset import Example, Faults, Reader, Row
from finetune.errors import DataError, EnvironmentFault
from finetune.runfolder import (
    atomic_folder,
    clear_leftovers_of,
    discard,
    json_bytes,
    remove,
    sync_file,
    user_cache,
    write_synced,
)
from finetune.samples import COLUMNS, Stored
from finetune.window import Named, Window, refuse_empty

if TYPE_CHECKING:
    pass

_KEPT = 32
"""Stores that stay in the cache; beyond them the longest unused go."""
_TOLD = 500
_DAY = 86_400
_SHAPING = (
    "conversation",
    "rowcheck",
    "messages",
    "formats",
    "dataset",
    "records",
    "datafolder",
    "hubdata",
    "renderer",
    "window",
    "store",
)


def cache_folder() -> Path:
    """Where stores lie."""
    return user_cache() / "rows"


def open_source(reader: Reader, window: Window, progress: dataset.Progress = dataset.silent) -> Stored:
    """The source's samples, from the cache or made now.

    Raises:
        DataError: rows that cannot be trained, each by its place; or none is left.
        EnvironmentFault: the cache cannot be written.
    """
    folder = cache_folder() / key(reader, window)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # of two runs that need it one makes it
            if not folder.is_dir() or manifest.faults(folder):
                _build(folder, reader, window, progress)
            return samples.load(folder, reader.source)
    except OSError as error:
        fix = "name a folder that can be written in XDG_CACHE_HOME"
        raise EnvironmentFault(f"the cache cannot be used: {error.strerror}", str(folder.parent), fix) from None


def key(reader: Reader, window: Window) -> str:
    """A digest of all that the samples depend on. Raises DataError where a file cannot be read."""
    source, renderer = reader.source, window.renderer
    tokenizer: Any = renderer.tokenizer
    package = Path(__file__).parent
    code = [path for name in _SHAPING for path in sorted([*package.glob(f"{name}.py"), *package.glob(f"{name}/*.py")])]
    try:
        data = {str(file): manifest.digest(file) for file in source.files()} or source.revision
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", source.path, "check it") from None
    what = {
        "data": data,
        "source": [source.path, source.format, dict(source.columns), source.split, source.subset],
        "refused": [reader.special_tokens, reader.literals],
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "ends": [renderer.stop_token, tokenizer.eos_token],
        "rendering": [renderer.piecewise, renderer.train_on, renderer.thinking, renderer.literals],
        "window": [window.max_length, window.policy, window.rows],
        "code": [__version__, *(manifest.digest(path) for path in code)],
    }
    return manifest.digest_bytes(json_bytes(what))[:32]


def _build(folder: Path, reader: Reader, window: Window, progress: dataset.Progress) -> None:
    clear_leftovers_of(folder)
    with atomic_folder(folder) as temporary:
        with _Writer(temporary, window.renderer.tokenizer.added_tokens_decoder) as writer:
            _fill(writer, reader, window, progress)
        write_synced(temporary / "meta.json", json_bytes(writer.meta(reader)))
        manifest.write(temporary, manifest.digests(temporary))
    _prune(folder)


def _fill(writer: _Writer, reader: Reader, window: Window, progress: dataset.Progress) -> None:
    faults = Faults(reader.source.path)
    samples = 0
    for read in reader:
        if read.number % _TOLD == 0:
            progress(reader.source.path, read.number, read.done)
        if isinstance(read.found, RowFault):
            faults.add(read.where, read.found)
            continue
        faults.rows += 1
        if (fault := window.refusal(read.found)) is not None:
            faults.add(read.where, fault)
            continue
        try:
            placed = window.place(Row(conversation=read.found, where=read.where))
        except DataError as error:
            faults.put(error.faults[0])
            continue
        samples += len(placed.examples)
        if not faults.first:
            writer.add(read.number, placed.examples, placed.named)
            writer.fold(dataset.folded(read.found))
    progress(reader.source.path, faults.rows, 1.0)
    faults.raise_if_any()
    refuse_empty(samples, window.max_length, reader.source.path)


class _Writer:
    """The files of a store, appended to row by row."""

    def __init__(self, folder: Path, added: Collection[int]) -> None:
        self.folder, self.added = folder, frozenset(added)
        self.met: set[int] = set()
        self.weights: dict[float, int] = {0.0: 0, 1.0: 1}
        self.tokens = self.rows = self.places = 0

    def __enter__(self) -> _Writer:
        self.files: dict[str, IO[bytes]] = {name: (self.folder / name).open("wb") for name in COLUMNS}
        self.names = (self.folder / "named.jsonl").open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.close()
        self.names.close()
        for name in (*COLUMNS, "named.jsonl"):
            sync_file(self.folder / name)

    def add(self, row: int, examples: Sequence[Example], named: Named | None) -> None:
        for example in examples:
            self.tokens += len(example.ids)
            self.met |= self.added.intersection(example.ids)
            self._put("ids", example.ids)
            self._put("marks", self._numbers(example.weights))
            place = example.where.encode("utf-8", "surrogateescape")
            self.places += len(place)
            self._put("ends", [self.tokens])
            self._put("supervised", [len(example.weights) - example.weights.count(0.0)])
            self._put("halves", [example.half])
            self._put("labels", [-1 if example.label is None else int(example.label)])
            self._put("rows", [row])
            self._put("places", place)
            self._put("place_ends", [self.places])
        if named:
            self.names.write(json.dumps(named.to_dict(), ensure_ascii=False) + "\n")

    def fold(self, digest: bytes) -> None:
        self.rows += 1
        self.files["folded"].write(digest)

    def _put(self, name: str, values: Sequence[int]) -> None:
        self.files[name].write(array(COLUMNS[name], values).tobytes())

    def _numbers(self, weights: Sequence[float]) -> list[int]:
        """Each weight's number. A source has few different ones; beyond 256 a byte would not hold them."""
        for weight in set(weights) - self.weights.keys():
            if len(self.weights) > 255:
                raise DataError("more than 254 different weights", str(self.folder), "round them")
            self.weights[weight] = len(self.weights)
        return [self.weights[weight] for weight in weights]

    def meta(self, reader: Reader) -> dict[str, Any]:
        return {
            "weights": list(self.weights), "rows": self.rows, "tokens": self.tokens, "mapping": reader.mapping,
            "added_tokens": sorted(self.met),
        }  # fmt: skip


def _prune(kept: Path) -> None:
    """Take away the stores that were not used for longest, and what killed writers left long ago."""
    everything = [path for path in kept.parent.iterdir() if path.is_dir() and path != kept]
    stale = [path for path in everything if ".tmp-" in path.name and time.time() - path.stat().st_mtime > _DAY]
    stores = [path for path in everything if ".tmp-" not in path.name]
    stale += sorted(stores, key=lambda one: one.stat().st_mtime, reverse=True)[_KEPT - 1 :]
    for path in stale:
        remove(path) if ".tmp-" in path.name else discard(path)
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
