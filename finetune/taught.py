"""What a teacher said of rows, on disk: at each supervised position its likeliest tokens and their log-probabilities.

A folder of safetensors parts, ``teacher.json`` and a manifest. A sample is known by its token ids and by which of them
are supervised, so that the same rows in another order, file or packing are found, and a row that has changed is not.
What lies beyond the k likeliest is kept as one number, the log-probability of all other tokens together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune import manifest, unfinished
from finetune.errors import ModelError
from finetune.kernels.divergence import Top
from finetune.runfolder import json_bytes, read_json, write_atomic

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.objectives import Batch

FOLDER = "teacher"
"""In a run's folder: what its teacher said of the held-out rows."""
FACTS = "teacher.json"
PARTS = "part-*.safetensors"
_TENSORS = ("ids", "log_probs", "rest")
_DAMAGED = "write it again: finetune teach"


def key(ids: Sequence[int], places: Sequence[int]) -> bytes:
    """What a sample is known by. ``places``: of its supervised tokens."""
    said = torch.tensor([len(ids), *ids, *places], dtype=torch.int32)
    return blake2b(said.numpy().tobytes(), digest_size=16).digest()


def key_of(example: Example) -> bytes:
    return key(example.ids, [place for place, weight in enumerate(example.weights) if weight > 0])


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a record is of. ``teacher``: digests, by the files' names; ``name``: the teacher's, for people;
    ``vocabulary``: a digest of the tokens by their ids; ``width``: how many of them could be said."""

    teacher: Mapping[str, str]
    name: str
    vocabulary: str
    temperature: float
    top_k: int
    width: int

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"teacher": dict(self.teacher)}


@dataclass(frozen=True, kw_only=True)
class Taught:
    """A record that is whole."""

    folder: Path
    facts: Facts
    digest: str
    """Of its manifest, and so of every byte."""
    tokens: int
    samples: int
    _open: dict[int, Any] = field(default_factory=dict, repr=False)

    @property
    def temperature(self) -> float:
        return self.facts.temperature

    @cached_property
    def _places(self) -> dict[bytes, tuple[int, int, int]]:
        """Sample → part, and the positions that are its own there."""
        found = {}
        for number in range(len(list(self.folder.glob(PARTS)))):
            keys, ends = (self._part(number).get_tensor(name) for name in ("keys", "ends"))
            for one, (low, high) in zip(keys.numpy(), itertools.pairwise([0, *ends.tolist()]), strict=True):
                found[one.tobytes()] = number, low, high
        return found

    def _part(self, number: int) -> Any:
        from safetensors import safe_open

        if number not in self._open:
            self._open[number] = safe_open(self.folder / _part_name(number), framework="pt")
        return self._open[number]

    def missing(self, examples: Iterable[Example]) -> list[str]:
        """The places of the samples that it says nothing of."""
        return [example.where for example in examples if key_of(example) not in self._places]

    def of(self, batch: Batch) -> Top:
        """What it says of a batch's supervised tokens, in the order of ``batch.predictors``. On the CPU.

        Raises:
            ModelError: it says nothing of one of the samples.
        """
        ids, predictors = batch.ids[0].tolist(), batch.predictors.tolist()
        parts: list[list[torch.Tensor]] = [[], [], []]
        begun = 0
        for (low, high), count, where in zip(itertools.pairwise(batch.bounds), batch.spans, batch.rows, strict=True):
            places = [at + 1 - low for at in predictors[begun : begun + count]]
            begun += count
            found = self._places.get(key(ids[low:high], places))
            if found is None:
                raise ModelError("the stored teacher says nothing of this row", where, _DAMAGED)
            part = self._part(found[0])
            for name, into in zip(_TENSORS, parts, strict=True):
                into.append(part.get_slice(name)[found[1] : found[2]])
        told, log_probs, rest = map(torch.cat, parts)
        return Top(ids=told.long(), log_probs=log_probs, rest=rest, width=self.facts.width)


def is_one(folder: Path) -> bool:
    return (folder / FACTS).is_file()


def digest(folder: Path) -> str:
    """Of the record's manifest, and so of every byte; empty where there is none."""
    return manifest.digest(folder / manifest.NAME) if is_one(folder) else ""


def read(folder: Path) -> Taught:
    """The record in a folder, every byte verified.

    Raises:
        ModelError: it is damaged, or not one.
    """
    stored, faults = read_json(folder / FACTS), manifest.faults(folder)
    if faults or not isinstance(stored, dict):
        raise ModelError(faults[0] if faults else f"{FACTS} is damaged", str(folder), _DAMAGED)
    try:
        facts = Facts(**{name: stored[name] for name in Facts.__dataclass_fields__})
        tokens, samples = int(stored["tokens"]), int(stored["samples"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{FACTS} is damaged", str(folder), _DAMAGED) from None
    return Taught(folder=folder, facts=facts, digest=digest(folder), tokens=tokens, samples=samples)


def distinct(examples: Iterable[Example]) -> Iterator[Example]:
    """Every sample once."""
    met: set[bytes] = set()
    for example in examples:
        if (one := key_of(example)) not in met:
            met.add(one)
            yield example


@dataclass(frozen=True, kw_only=True)
class Part:
    """What was said of some samples, one after the other."""

    keys: Sequence[bytes]
    ends: Sequence[int]
    top: Top


class Writer:
    """The parts of a record, each whole on the disk once it has its name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokens, self.samples = folder, 0, 0

    def has(self, number: int) -> bool:
        """Whether that part was finished before, by this command where it was killed; then it is counted."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / _part_name(number)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as part:
                self._count(part.get_tensor("ends").tolist())
        except (SafetensorError, OSError):
            return False
        return True

    def put(self, number: int, part: Part) -> None:
        from safetensors.torch import save

        keys = torch.frombuffer(bytearray(b"".join(part.keys)), dtype=torch.uint8).view(-1, 16)
        tensors = {
            "keys": keys, "ends": torch.tensor(part.ends), "ids": part.top.ids.to(torch.int32),
            "log_probs": part.top.log_probs.float(), "rest": part.top.rest.float(),
        }  # fmt: skip
        write_atomic(self.folder / _part_name(number), save({k: v.contiguous() for k, v in tensors.items()}))
        self._count(part.ends)

    def _count(self, ends: Sequence[int]) -> None:
        self.samples, self.tokens = self.samples + len(ends), self.tokens + (ends[-1] if ends else 0)

    def close(self, facts: Facts) -> None:
        told = facts.to_dict() | {"samples": self.samples, "tokens": self.tokens}
        write_atomic(self.folder / FACTS, json_bytes(told))
        manifest.write(self.folder, manifest.digests(self.folder))


def made_of(facts: Facts, keys: Iterable[bytes]) -> dict[str, Any]:
    """What decides every byte of a record: the teacher, how it is asked, and the samples in their order."""
    total = blake2b(digest_size=32)
    for one in keys:
        total.update(one)
    return facts.to_dict() | {"name": "", "rows": total.hexdigest()}


def making(out: Path, made: dict[str, Any]) -> Any:
    """The folder to write into: as ``unfinished.folder``."""
    return unfinished.folder(out, made, (PARTS,))


def _part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"
