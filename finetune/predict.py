"""``finetune predict``: every row of a file answered, each answer beside its row's own columns; a reward model scores.

Rows of like length share a batch, the longest first, so that what does not fit memory shows at once. Each batch is one
line of ``OUT.part`` when it is done; a killed command goes on from there, and answers again what a torn last line held.
At the end the answers stand in ``OUT`` in the order of the rows, and ``OUT.facts.json`` says of which model and
settings they are. A batch always has the same rows, and each row is drawn by its own number: the bytes do not depend on
where the work was cut.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from finetune import bare, checkpoint, generation, hardware, manifest, rating, tokenizer, trained, unanswered
from finetune.base import Base
from finetune.dataset import Source
from finetune.errors import DataError, EnvironmentFault, ModelError
from finetune.model import Policy
from finetune.renderer import Renderer
from finetune.runfolder import disk_fault, make_folder, read_json, remove, rename, sync_folder, write_json
from finetune.sampling import GREEDY, Sampling
from finetune.terminal import Progress, Terminal


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How to answer. ``base``: without the adapter; ``column``: where the answer goes, by default answer, of a reward
    model reward; ``sampling``: None is greedy."""

    base: bool = False
    max_new_tokens: int = 256
    batch_rows: int = 16
    column: str | None = None
    sampling: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that is not loaded yet. ``identity``: its digests and form; ``rows``: how its run reads rows."""

    base: Base
    identity: Mapping[str, Any]
    renderer: Renderer
    rows: Mapping[str, Any]
    load: Callable[[], Policy]


def predict(folder: Path, data: Path, out: Path, asked: Asked, terminal: Terminal) -> dict[str, Any]:
    """Answer the rows of ``data`` into ``out``; → the facts that stand beside it.

    Raises:
        ModelError: no model, adapter or run is there, or it is damaged.
        DataError: rows that cannot be asked, each by its place.
        EnvironmentFault: ``out`` is of something else, or another process works on it.
    """
    opened = _open(folder, terminal)
    asked = _settled(asked, opened)
    column = asked.column or ""
    if not data.is_file():
        raise DataError("no such file", str(data), "name a file with rows")
    facts: dict[str, Any] = {
        "model": str(folder), **opened.identity, "data": str(data), "data_sha256": manifest.digest(data),
        "settings": asdict(asked),
    }  # fmt: skip
    said = {key: facts[key] for key in (*opened.identity, "data_sha256", "settings")}
    facts["key"] = manifest.digest_bytes(json.dumps(said, sort_keys=True, default=dict).encode())
    beside = out.with_name(f"{out.name}.facts.json")
    if out.exists() or out.is_symlink():
        return _done(out, beside, facts["key"], terminal)
    job = _job(data, opened, asked, column)
    make_folder(out.parent)
    part = out.with_name(f"{out.name}.part")
    with _held(part) as file:
        found, cut = _answer(file, part, facts["key"], job, opened, asked, terminal)
        if manifest.digest(data) != facts["data_sha256"]:
            raise DataError("this file has changed meanwhile", str(data), "put it back, and run the same command")
        temporary = _write(out, data, opened, column, found)
        facts |= {
            "rows": len(found), "cut": cut, "sha256": manifest.digest(temporary),
            "environment": hardware.environment(hardware.detect()),
        }  # fmt: skip
        write_json(beside, facts)  # first: answers never stand without what they are of
        rename(temporary, out)
        sync_folder(out.parent)
        remove(part)
    done = "scored" if opened.base.shape.scored else "answered"
    terminal.say(f"{out}: {len(found):,} rows {done}; what they are of: {beside}")
    if cut:
        terminal.say(f"{cut:,} answers were cut at {asked.max_new_tokens} tokens: --max-new-tokens allows more")
    return facts


@dataclass(frozen=True, kw_only=True)
class Job:
    """The rows' ``lengths`` in tokens, and what answers some, by their places: → (answers, how many were cut)."""

    lengths: Sequence[int]
    do: Callable[[Policy, Sequence[int]], tuple[list[Any], int]]


def _settled(asked: Asked, opened: Opened) -> Asked:
    """With the column that is meant. Raises ModelError for what a reward model cannot do."""
    if not opened.base.shape.scored:
        return replace(asked, column=asked.column or "answer")
    if asked.base or asked.sampling:
        what = "a reward model's base has no score head" if asked.base else "a reward model draws nothing"
        raise ModelError(what, "--base" if asked.base else "--temperature", "leave it out")
    return replace(asked, column=asked.column or "reward")


def _job(data: Path, opened: Opened, asked: Asked, column: str) -> Job:
    """What is to be done with the rows. Raises DataError."""
    rows, most = _rows(data, opened), opened.base.shape.max_positions
    if opened.base.shape.scored:
        texts = rating.texts(rows, opened.renderer, longest=most, column=column)
        lengths = [sum(len(one.ids) for one in row) for row in texts]
        return Job(lengths=lengths, do=lambda policy, chosen: (rating.rate(policy, [texts[at] for at in chosen]), 0))
    prompts = unanswered.prompts(rows, opened.renderer, room=most - asked.max_new_tokens, column=column)
    sampling = GREEDY if asked.sampling is None else Sampling(**asked.sampling)

    def answer(policy: Policy, chosen: Sequence[int]) -> tuple[list[Any], int]:
        ids = answered(policy, [prompts[at] for at in chosen], asked.max_new_tokens, sampling, chosen)
        return [generation.text(policy, one) for one in ids], sum(len(one) >= asked.max_new_tokens for one in ids)

    return Job(lengths=[len(prompt) for prompt in prompts], do=answer)


def _rows(data: Path, opened: Opened) -> Source:
    return Source(path=str(data), **opened.rows)


def _done(out: Path, beside: Path, key: str, terminal: Terminal) -> dict[str, Any]:
    """The same command again changes nothing; anything else in the way is refused."""
    facts = read_json(beside)
    same = isinstance(facts, dict) and facts.get("key") == key
    if isinstance(facts, dict) and same and out.is_file() and manifest.digest(out) == facts.get("sha256"):
        remove(out.with_name(f"{out.name}.part"))
        terminal.say(f"{out} is just that already: nothing to do")
        return facts
    what = "what is there is altered" if same else "something else is there, of another model, file or settings"
    raise EnvironmentFault(what, str(out), "give another --out, or remove it")


def _open(folder: Path, terminal: Terminal) -> Opened:
    """A run, a bare adapter, or a model's folder (or its id on the hub, if it is on this disk)."""
    if (place := bare.find(folder)) is not None:
        found = bare.inspect(place)
        identity = found.identity(terminal) | {"adapter": None}
        return Opened(
            base=found.base, identity=identity, renderer=found.renderer(), rows={}, load=lambda: found.load(terminal)
        )  # fmt: skip
    given = trained.of(folder, terminal)
    identity = {
        "base": dict(given.sha256), "form": asdict(given.form), "rope": given.rope,
        "adapter": manifest.digest(given.folder / checkpoint.ADAPTER),
    }  # fmt: skip
    recipe = given.run.prepared.recipe.data if given.run else None
    made = Renderer(
        tokenizer.of(given.base), given.base.stop_token, piecewise=given.base.piecewise,
        thinking=recipe.thinking if recipe else "keep", literals=recipe.literal_tokens if recipe else (),
    )  # fmt: skip
    rows = {"format": recipe.format, "columns": recipe.columns} if recipe else {}
    return Opened(base=given.base, identity=identity, renderer=made, rows=rows, load=lambda: given.live(terminal))


@contextlib.contextmanager
def _held(part: Path) -> Iterator[IO[bytes]]:
    """The file of what is done, for this process alone; the kernel frees it however the process ends."""
    try:
        with part.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EnvironmentFault("another process is answering into it", str(part), "wait for it") from None
            yield file
    except OSError as error:
        raise disk_fault(error, part) from error


def _answer(
    file: IO[bytes], part: Path, key: str, job: Job, opened: Opened, asked: Asked, terminal: Terminal
) -> tuple[list[Any], int]:
    """All answers in the order of the rows, and how many were cut; what is in the file already is not asked again."""
    total, batches = len(job.lengths), generation.batches(job.lengths, asked.batch_rows)[::-1]
    done = _taken_up(file, part, key, batches)
    found: list[Any] = [""] * total
    cut = rows = 0
    for chosen, line in zip(batches, done, strict=False):
        rows, cut = rows + len(chosen), cut + line["cut"]
        for index, text in zip(chosen, line["answers"], strict=True):
            found[index] = text
    if done:
        terminal.say(f"going on after {rows:,} of {total:,} rows")
    if len(done) == len(batches):
        return found, cut
    policy = opened.load()
    bar = Progress(terminal, "answering", start=rows)
    with policy.evaluating(adapter=not asked.base):
        for number, chosen in enumerate(batches[len(done) :], len(done)):
            bar(rows, total)
            try:
                texts, short = job.do(policy, chosen)
            except torch.OutOfMemoryError as error:
                what = f"out of memory: {str(error).splitlines()[0]}"
                raise EnvironmentFault(what, f"{len(chosen)} rows at once", "lower --batch-rows") from None
            _append(file, {"batch": number, "answers": texts, "cut": short})
            for index, text in zip(chosen, texts, strict=True):
                found[index] = text
            rows, cut = rows + len(chosen), cut + short
    bar(rows, total)
    return found, cut


def answered(
    policy: Policy, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, rows: Sequence[int]
) -> list[list[int]]:
    """Ids of one batch's answers; ``rows``: their places in the file, which are the numbers of their draws."""
    return policy.generate(prompts, max_new_tokens, sampling=sampling, numbers=rows)


def _taken_up(file: IO[bytes], part: Path, key: str, batches: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """The batches that are done, in order; a torn or damaged end is cut off. Raises EnvironmentFault."""
    file.seek(0)
    good, done = 0, []
    for number, line in enumerate(file):
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            value = None
        if number == 0 and isinstance(value, dict) and value.get("key") != key:
            what = "answers of another model, file or settings are under way here"
            raise EnvironmentFault(what, str(part), "give another --out, or remove it")
        if not isinstance(value, dict) or (number and not _is_batch(value, number - 1, batches)):
            break
        good += len(line)
        done += [value] if number else []
    file.truncate(good)
    if not good:
        _append(file, {"key": key})
    return done


def _is_batch(value: Mapping[str, Any], number: int, batches: Sequence[Sequence[int]]) -> bool:
    texts = value.get("answers")
    return (
        number < len(batches)
        and value.get("batch") == number
        and isinstance(value.get("cut"), int)
        and isinstance(texts, list)
        and len(texts) == len(batches[number])
        and all(isinstance(text, str | float | dict) for text in texts)
    )


def _append(file: IO[bytes], value: Mapping[str, Any]) -> None:
    file.write(_line(value))
    file.flush()
    os.fsync(file.fileno())


def _line(value: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(value, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair in a column: JSON can escape it, UTF-8 has no bytes for it
        return (json.dumps(value, default=str) + "\n").encode()


def _write(out: Path, data: Path, opened: Opened, column: str, found: Sequence[Any]) -> Path:
    """The rows with their answers, in a temporary file beside ``out``."""
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            rows = (record.value for _, record in _rows(data, opened).records())
            for row, answer in zip(rows, found, strict=True):
                file.write(_line({**(row or {}), column: answer}))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        remove(temporary)
        raise disk_fault(error, temporary) from error
    except BaseException:
        remove(temporary)
        raise
    return temporary
