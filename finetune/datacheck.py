"""Judge data before anything is paid for: every row that cannot be trained, and what is odd about the others.

An error is a row that cannot be trained as it stands; a warning is a row that can, and perhaps should not. Memory holds
a few bytes a row, whatever its length.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from finetune import dataset, similar, texts
from finetune.conversation import Conversation, RowFault, strings
from finetune.dataset import Read, Reader
from finetune.errors import DataError
from finetune.repeats import Met, Repeats
from finetune.terminal import clean
from finetune.texts import Languages

if TYPE_CHECKING:
    from finetune.window import Window

CONTROL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>",
)  # fmt: skip
"""Control tokens of the families' templates, for a file that is judged without a model."""
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
        text = f"{clean(self.where, 400)}: {self.column + ': ' if self.column else ''}{self.message}"
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

    def unreadable(self, where: str, what: str, fix: str) -> None:
        """Note that the source cannot be read on from ``where``."""
        self.counts["unreadable"] += 1
        self.severities["error"] += 1
        self.findings.append(
            Finding(row=0, where=where, column="", severity="error", code="unreadable", message=what, fix=fix)
        )

    def repeated(self, found: Iterable[tuple[Read, RowFault]]) -> None:
        """Note rows that were met before."""
        for read, fault in found:
            self.add(read, fault, "warning")

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
        return [
            *lines,
            f"{clean(self.file, 400)}: {self.rows:,} rows, {self.trainable:,} can be trained; {found}{read}",
        ]

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


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is looked for besides faults: near copies, languages (each where its package is there), and with
    ``personal`` more personal data than the patterns find."""

    near: bool = field(default_factory=similar.available)
    languages: bool = field(default_factory=texts.can_tell_languages)
    personal: texts.Personal | None = None

    def notes(self) -> list[str]:
        """What is not looked for, and why."""
        missing = [name for name, there in (("near copies", self.near), ("languages", self.languages)) if not there]
        fix = "pip install 'finetune-qwen[data]'"
        return [f"{' and '.join(missing)} were not looked for ({fix})"] if missing else []


def check(
    reader: Reader, *, search: Search | None = None, met: Met | None = None, trained: Met | None = None,
    fitting: Window | None = None, progress: dataset.Progress = dataset.silent,
) -> Report:  # fmt: skip
    """Judge one source.

    Args:
        met: rows met in other sources of the same training data; this one's are added.
        trained: the training rows, where this source is to judge what was trained on them.
        fitting: the model's renderer and window, where answers that do not fit are to be found too.

    A source that cannot be read on is a finding too.
    """
    source, search = reader.source.path, search or Search()
    met = Met(near=search.near) if met is None else met
    report, lengths, languages = Report(file=source, notes=search.notes()), array("q"), Languages()
    repeats = Repeats(met, trained)
    met.begin(source)
    for read in _until_unreadable(reader, report):
        report.rows += 1
        if report.rows % _TOLD == 0:
            progress(source, report.rows, read.done)
        if isinstance(read.found, RowFault):
            report.add(read, read.found, "error")
            met.skip()
            continue
        unfit = list(_unfit(read.found, read.where, fitting)) if fitting else []
        report.trainable += not any(severity == "error" for _, severity in unfit)
        for fault, severity in unfit:
            report.add(read, fault, severity)
        for fault in _odd(read.found, search):
            report.add(read, fault, "warning")
        report.repeated(repeats.look(read, read.found))
        if search.languages:
            languages.add(read.where, read.found.turns[-1].content)
        lengths.append(sum(len(turn.content) for turn in read.found.turns))
    report.repeated(repeats.rest())
    progress(source, report.rows, 1.0)
    report.mapping = reader.mapping
    _add_strays(report, languages)
    _add_outliers(report, lengths)
    if not report.rows and not report.errors:
        fault = RowFault("", "there are no rows in this file", "give a file with at least one row", code="empty_file")
        report.add(None, fault, "error")
    return report


def _until_unreadable(reader: Reader, report: Report) -> Iterator[Read]:
    """The rows, up to where the source itself cannot be read: that is one more finding, after those before it."""
    try:
        yield from reader
    except DataError as error:
        for what, where, fix in error.faults:
            report.unreadable(where or report.file, what, fix)


def _unfit(conversation: Conversation, where: str, fitting: Window) -> Iterator[tuple[RowFault, str]]:
    """What only the model's own tokenizer and template can tell, and the recipe's objective."""
    if (fault := fitting.refusal(conversation)) is not None:
        yield fault, "error"
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
        if any(fitting.renderer.normal(turn.content) != turn.content for turn in turns):
            what = "has characters that the tokenizer writes otherwise (Unicode normalisation)"
            yield RowFault("", what, "nothing, if the composed form will do", code="normalised"), "warning"
        if any(example.apart for example in examples):
            what = "is tokenised in pieces: its text as one would have other ids"
            yield RowFault("", what, "nothing, if the row is meant so", code="pieces"), "warning"


def _odd(conversation: Conversation, search: Search) -> Iterator[RowFault]:
    """What is odd about any text of a row: contents, thinking, arguments of calls, descriptions of tools."""
    for number, turn in enumerate(conversation.every_turn(), 1):
        for text in (turn.content, turn.thinking, *(one for call in turn.calls for one in strings(call.arguments))):
            for oddity in texts.oddities(text, search.personal) if text else ():
                yield RowFault(f"turn {number} ({turn.role})", oddity.message, oddity.fix, code=oddity.code)
    for text in strings(conversation.tools):
        for oddity in texts.oddities(text, search.personal):
            yield RowFault("tools", oddity.message, oddity.fix, code=oddity.code)


def _add_strays(report: Report, languages: Languages) -> None:
    """Answers in another language than nine tenths of them are, in one finding for each language."""
    for stray in languages.strays():
        what = f"{stray.rows} answers look like {stray.language!r}, nine in ten like {languages.main()!r}"
        fault = RowFault(
            "", f"{what}; the first are {', '.join(stray.first)}", "see whether they belong", code="language"
        )
        report.add(None, fault, "warning")


def _add_outliers(report: Report, lengths: Sequence[int]) -> None:
    """Rows that are very much longer than the others, in one finding."""
    if len(lengths) < _FEW:
        return
    median = sorted(lengths)[len(lengths) // 2]
    long = [length for length in lengths if length > _LONG * max(median, 1)]
    if long:
        are = "row is" if len(long) == 1 else "rows are"
        usual = f"{_LONG} times as long as the median ({median} characters; longest {max(long)})"
        what = f"{len(long)} {are} over {usual}"
        report.add(None, RowFault("", what, "see whether they belong here", code="length_outlier"), "warning")
