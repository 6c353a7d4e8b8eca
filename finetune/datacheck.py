"""Judge data before anything is paid for: every row that cannot be trained, and what is odd about the others.

An error is a row that cannot be trained as it stands; a warning is a row that can, and perhaps should not. Memory holds
a few bytes a row, whatever its length.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import dataset
from finetune.conversation import RowFault
from finetune.recipe import secrets_shape

if TYPE_CHECKING:
    from finetune.conversation import Conversation
    from finetune.records import Record
    from finetune.renderer import Renderer

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
_SHOWN = 20
"""Findings of one kind that are printed; all are in the JSON."""
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
    """What a check found in one file."""

    file: str
    rows: int = 0
    trainable: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(finding.severity == "error" for finding in self.findings)

    def lines(self) -> list[str]:
        """The findings for a reader: the first of each kind, how many there are, and the sum."""
        shown: Counter[str] = Counter()
        lines = []
        for finding in self.findings:
            shown[finding.code] += 1
            if shown[finding.code] <= _SHOWN:
                lines.append(str(finding))
        lines += [f"… and {n - _SHOWN} more of {code}" for code, n in sorted(shown.items()) if n > _SHOWN]
        found = f"{self.errors} errors, {len(self.findings) - self.errors} warnings"
        return [*lines, f"{self.file}: {self.rows:,} rows, {self.trainable:,} can be trained; {found}"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "summary": {
                "file": self.file,
                "rows": self.rows,
                "trainable": self.trainable,
                "errors": self.errors,
                "warnings": len(self.findings) - self.errors,
                "codes": dict(sorted(self.counts.items())),
            },
        }


@dataclass
class Seen:
    """Digests of the rows that were met: as they stand, and with white space and case aside."""

    exact: dict[bytes, int] = field(default_factory=dict)
    folded: dict[bytes, int] = field(default_factory=dict)


def check(
    path: Path, format_name: str = "auto", special_tokens: Sequence[str] = CONTROL, *,
    trained: Seen | None = None, render: tuple[Renderer, int] | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[Report, Seen]:  # fmt: skip
    """Judge one file.

    Args:
        trained: the training rows, where this file is to judge what was trained on them.
        render: the model's renderer and the window, where answers that do not fit are to be found too.

    Raises:
        DataError: the file itself cannot be read.
    """
    report, seen, lengths = Report(file=str(path)), Seen(), list[int]()
    for record, read in dataset.conversations(path, format_name, special_tokens):
        report.rows += 1
        where = f"{path}:{record.place}"
        if isinstance(read, RowFault):
            _add(report, record, where, read, "error")
            continue
        faults = list(_unfit(read, where, render)) if render else []
        report.trainable += not faults
        for fault in faults:
            _add(report, record, where, fault, "error")
        for fault in (*_text_warnings(read), *_repeats(read, record.number, seen, trained)):
            _add(report, record, where, fault, "warning")
        lengths.append(sum(len(turn.content) for turn in read))
        if report.rows % 1000 == 0:
            progress(report.rows)
    progress(report.rows)
    _add_outliers(report, path, lengths)
    if not report.rows:
        fault = RowFault("", "there are no rows in this file", "give a file with at least one row", code="empty_file")
        _add(report, None, str(path), fault, "error")
    return report, seen


def _add(report: Report, record: Record | None, where: str, fault: RowFault, severity: str) -> None:
    report.counts[fault.code] += 1
    report.findings.append(
        Finding(
            row=record.number if record else 0, where=where, column=fault.column, severity=severity, code=fault.code,
            message=fault.what, fix=fault.fix,
        )
    )  # fmt: skip


def _unfit(conversation: Conversation, where: str, render: tuple[Renderer, int]) -> Iterator[RowFault]:
    """What only the model's own tokenizer and template can tell."""
    from finetune.errors import DataError

    renderer, window = render
    try:
        examples = renderer.examples(dataset.Row(conversation=conversation, where=where))
    except DataError as error:
        yield RowFault("", error.faults[0].what, error.faults[0].fix, code="template")
        return
    longest = max(len(example.ids) for example in examples)
    if longest > window:
        what = f"{longest} tokens, more than train.max_length {window}"
        yield RowFault("", what, "raise train.max_length or shorten the row", code="too_long")


def _text_warnings(conversation: Conversation) -> Iterator[RowFault]:
    for number, turn in enumerate(conversation, 1):
        place = f"turn {number} ({turn.role})"
        if any(True for _ in secrets_shape.spots(turn.content)):
            yield RowFault(place, "holds something shaped like a secret", "remove it and revoke it", code="secret")
        if found := _PERSONAL.search(turn.content):
            kind = {"email": "an e-mail address", "card": "a card number", "iban": "an IBAN"}[found.lastgroup or ""]
            yield RowFault(place, f"holds {kind} at {found.start()}", "replace it if it is real", code="personal_data")
        if found := _MOJIBAKE.search(turn.content):
            what = f"looks wrongly decoded at {found.start()}: {found.group()!r}"
            yield RowFault(place, what, "decode the source as UTF-8", code="mojibake")


def _repeats(conversation: Conversation, number: int, seen: Seen, trained: Seen | None) -> Iterator[RowFault]:
    """Rows that were met before, in this file or among those that are trained."""
    exact = _digest(f"{turn.role}\0{turn.content}" for turn in conversation)
    folded = _digest(f"{turn.role}\0{' '.join(turn.content.split()).casefold()}" for turn in conversation)
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
    seen.exact.setdefault(exact, number)
    seen.folded.setdefault(folded, number)


def _digest(texts: Any) -> bytes:
    return blake2b("\1".join(texts).encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _add_outliers(report: Report, path: Path, lengths: list[int]) -> None:
    """Rows that are very much longer than the others, in one finding."""
    if len(lengths) < _FEW:
        return
    median = sorted(lengths)[len(lengths) // 2]
    long = [length for length in lengths if length > _LONG * max(median, 1)]
    if long:
        what = (
            f"{len(long)} rows are over {_LONG} times as long as the median ({median} characters; longest {max(long)})"
        )
        fault = RowFault("", what, "see whether they belong here", code="length_outlier")
        _add(report, None, str(path), fault, "warning")
