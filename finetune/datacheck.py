"""Judge data before anything is paid for: every row that cannot be trained, and what is odd about the others.

An error is a row that cannot be trained as it stands; a warning is a row that can, and perhaps should not. Memory holds
a few bytes a row, whatever its length.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from finetune import dataset
from finetune.conversation import Conversation, RowFault, Turn
from finetune.dataset import Read, Reader
from finetune.errors import DataError
from finetune.recipe import secrets_shape

if TYPE_CHECKING:
    from finetune.window import Window

CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>",
)  # fmt: skip
"""Control tokens of the families' templates, for a file that is judged without a model."""
_PERSONAL = re.compile(
    r"(?P<email>[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63})+)"
    r"|(?P<card>(?<![\d-])(?:\d{4}[ -]){3}\d{4}(?![\d-]))"
    r"|(?P<iban>(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?!\w))"
)
_MOJIBAKE = re.compile("Ã[\u0080-\u00bf]|â€[\u0080-\u00bf\u2122\u0153\u009d]|Â[\u00a0-\u00bf]|\ufffd")
_SHOWN, _KEPT, _TOLD = 20, 10_000, 1000
"""Findings of one kind that are printed, and that are kept for the JSON; rows between two signs of life."""
_LONG, _FEW = 20, 20
"""A row is an outlier beyond so many times the median length, in a file of at least so many rows."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing found. ``row`` counts records from 1; ``where`` is ``file:line``."""

    row: int
    where: str
    column: str
    severity: str
    code: str
    message: str
    fix: str

    def __str__(self) -> str:
        text = f"{self.where}: {self.column + ': ' if self.column else ''}{self.message}"
        return f"{self.severity}: {text}{'; ' + self.fix if self.fix else ''} [{self.code}]"


@dataclass
class Report:
    """What a check found in one source. Counts are of everything; of each kind ``_KEPT`` findings are kept."""

    file: str
    mapping: str = ""
    rows: int = 0
    trainable: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    severities: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return self.severities["error"]

    def add(self, read: Read | None, fault: RowFault, severity: str) -> None:
        """Note a fault of a row, or of the whole source."""
        self.counts[fault.code] += 1
        self.severities[severity] += 1
        if self.counts[fault.code] <= _KEPT:
            self.findings.append(
                Finding(
                    row=read.number if read else 0, where=read.where if read else self.file, column=fault.column,
                    severity=severity, code=fault.code, message=fault.what, fix=fault.fix,
                )
            )  # fmt: skip

    def lines(self) -> list[str]:
        """The findings for a reader: the first of each kind, how many there are, and the sum."""
        shown: Counter[str] = Counter()
        lines = []
        for finding in self.findings:
            shown[finding.code] += 1
            if shown[finding.code] <= _SHOWN:
                lines.append(str(finding))
        lines += [f"… and {n - _SHOWN} more of {code}" for code, n in sorted(self.counts.items()) if n > _SHOWN]
        lines += [f"note: {note}" for note in self.notes]
        found = f"{self.errors} errors, {self.severities['warning']} warnings"
        read = f" (read as {self.mapping})" if self.mapping else ""
        return [*lines, f"{self.file}: {self.rows:,} rows, {self.trainable:,} can be trained; {found}{read}"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "summary": {
                "file": self.file,
                "mapping": self.mapping,
                "rows": self.rows,
                "trainable": self.trainable,
                "errors": self.errors,
                "warnings": self.severities["warning"],
                "codes": dict(sorted(self.counts.items())),
                "notes": self.notes,
            },
        }


@dataclass
class Seen:
    """Digests of the rows that were met: as they stand, and with white space and case aside."""

    exact: dict[bytes, str] = field(default_factory=dict)
    folded: dict[bytes, str] = field(default_factory=dict)


def check(
    reader: Reader, *, seen: Seen | None = None, trained: Seen | None = None, fitting: Window | None = None,
    progress: dataset.Progress = dataset.silent,
) -> Report:  # fmt: skip
    """Judge one source.

    Args:
        seen: rows met in other sources of the same training data; this one's are added.
        trained: the training rows, where this source is to judge what was trained on them.
        fitting: the model's renderer and window, where answers that do not fit are to be found too.

    Raises:
        DataError: the source itself cannot be read.
    """
    source = reader.source.path
    report, seen, lengths = Report(file=source), Seen() if seen is None else seen, array("q")
    for read in reader:
        report.rows += 1
        if report.rows % _TOLD == 0:
            progress(source, report.rows, read.done)
        if isinstance(read.found, RowFault):
            report.add(read, read.found, "error")
            continue
        unfit = list(_unfit(read.found, read.where, fitting)) if fitting else []
        report.trainable += not any(severity == "error" for _, severity in unfit)
        for fault, severity in unfit:
            report.add(read, fault, severity)
        for fault in (*_text_warnings(read.found), *_repeats(read.found, read.where, seen, trained)):
            report.add(read, fault, "warning")
        lengths.append(sum(len(turn.content) for turn in read.found.turns))
    progress(source, report.rows, 1.0)
    report.mapping = reader.mapping
    _add_outliers(report, lengths)
    if not report.rows:
        fault = RowFault("", "there are no rows in this file", "give a file with at least one row", code="empty_file")
        report.add(None, fault, "error")
    return report


def _unfit(conversation: Conversation, where: str, fitting: Window) -> Iterator[tuple[RowFault, str]]:
    """What only the model's own tokenizer and template can tell."""
    for turns in conversation.endings():
        row = dataset.Row(conversation=replace(conversation, turns=turns, rejected=()), where=where)
        try:
            examples = fitting.renderer.examples(row)
        except DataError as error:
            yield RowFault("", error.faults[0].what, error.faults[0].fix, code="template"), "error"
            return
        longest = max(len(example.ids) for example in examples)
        if longest > fitting.max_length:
            what = f"{longest} tokens, more than train.max_length {fitting.max_length} (data.over_length)"
            severity = "error" if fitting.policy == "error" else "warning"
            yield RowFault("", what, "raise train.max_length or shorten the row", code="too_long"), severity
        if any(example.apart for example in examples):
            what = "is tokenised in pieces: its text as one would have other ids"
            yield RowFault("", what, "nothing, if the row is meant so", code="pieces"), "warning"


def _every_turn(conversation: Conversation) -> tuple[Turn, ...]:
    """The turns, and those of the rejected ending that are not among them."""
    return *conversation.turns, *(turn for turn in conversation.rejected if turn not in conversation.turns)


def _text_warnings(conversation: Conversation) -> Iterator[RowFault]:
    for number, turn in enumerate(_every_turn(conversation), 1):
        place = f"turn {number} ({turn.role})"
        if any(True for _ in secrets_shape.spots(turn.content)):
            yield RowFault(place, "holds something shaped like a secret", "remove it and revoke it", code="secret")
        if found := _PERSONAL.search(turn.content):
            kind = {"email": "an e-mail address", "card": "a card number", "iban": "an IBAN"}[found.lastgroup or ""]
            yield RowFault(place, f"holds {kind} at {found.start()}", "replace it if it is real", code="personal_data")
        if found := _MOJIBAKE.search(turn.content):
            what = f"looks wrongly decoded at {found.start()}: {found.group()!r}"
            yield RowFault(place, what, "decode the source as UTF-8", code="mojibake")


def _repeats(conversation: Conversation, where: str, seen: Seen, trained: Seen | None) -> Iterator[RowFault]:
    """Rows that were met before, among those that are trained or in the same source."""
    turns = _every_turn(conversation)
    exact = _digest(f"{turn.role}\0{turn.content}" for turn in turns)
    folded = dataset.folded(turns)
    if exact in seen.exact:
        yield RowFault("", f"is row {seen.exact[exact]} again", "drop one", code="duplicate")
    elif folded in seen.folded:
        what = f"is row {seen.folded[folded]} again but for white space and case"
        yield RowFault("", what, "drop one", code="near_duplicate")
    if trained and exact in trained.exact:
        what = f"is training row {trained.exact[exact]} too: a score on it flatters"
        yield RowFault("", what, "hold it out", code="leak")
    elif trained and folded in trained.folded:
        what = f"is training row {trained.folded[folded]} but for white space and case: a score on it flatters"
        yield RowFault("", what, "hold it out", code="leak")
    seen.exact.setdefault(exact, where)
    seen.folded.setdefault(folded, where)


def _digest(texts: Iterable[str]) -> bytes:
    return blake2b("\1".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _add_outliers(report: Report, lengths: Sequence[int]) -> None:
    """Rows that are very much longer than the others, in one finding."""
    if len(lengths) < _FEW:
        return
    median = sorted(lengths)[len(lengths) // 2]
    long = [length for length in lengths if length > _LONG * max(median, 1)]
    if long:
        what = (
            f"{len(long)} rows are over {_LONG} times as long as the median ({median} characters; longest {max(long)})"
        )
        report.add(None, RowFault("", what, "see whether they belong here", code="length_outlier"), "warning")
