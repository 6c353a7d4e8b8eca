"""On which terms a derivative may be passed on: the base's licence and the data's, with the texts that must go along.

Nothing is invented: a licence that is not known is said to be unknown, a text that is missing is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import families, fetch
from finetune.base import ORIGIN, Base
from finetune.dataset import Source
from finetune.errors import EnvironmentFault, Fault
from finetune.families import APACHE, Licence

_NO_DERIVATIVES = ("-nd-", "-nd", "no-derivatives", "all-rights-reserved", "proprietary")
"""Parts of licence names under which nothing made from the data may be passed on."""
_TEXTS = ("LICENSE*", "LICENCE*", "license*", "licence*", "*LICENSE AGREEMENT*")


@dataclass(frozen=True, kw_only=True)
class DataTerms:
    """The licence of one source, by id or ``unknown``; the text found beside the data and its place in a release."""

    source: str
    licence: str
    text: Path | None
    place: str


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a release must carry. ``texts``: files of the base's licence; ``notices``: its own notices."""

    base: str
    licence: Licence | None
    texts: tuple[Path, ...]
    notices: tuple[Path, ...]
    data: tuple[DataTerms, ...]

    @property
    def base_on_hub(self) -> bool:
        """Whether others know the base by this name; a folder of this machine means nothing to them."""
        return fetch.is_hub_id(self.base) and not Path(self.base).is_dir()

    def missing(self) -> list[str]:
        """What ought to be there and is not, in words."""
        found = []
        if self.licence is None:
            found.append(f"the licence of the base {self.base} is not known to this tool")
        if not self.texts and not (self.licence and self.licence.text):
            found.append(f"the base {self.base} came without the text of its licence")
        found += [f"the licence of the data {one.source} is unknown" for one in self.data if one.licence == "unknown"]
        return found


def find(base: Base, name: str, sources: Sequence[Source], data_licence: str | None) -> Terms:
    """The terms of a run's base and data.

    Args:
        data_licence: the licence of all data, where the user says it; else the text beside each file speaks.
    """
    folders = [base.folder, base.folder / ORIGIN]
    texts = tuple(path for folder in folders for path in _files(folder, _TEXTS))[:2]
    notices = tuple(path for folder in folders for path in _files(folder, ("NOTICE*", "Notice*")))[:2]
    licence = families.licence(name) or (APACHE if any(map(_is_apache, texts)) else None)
    data = tuple(_data(source, data_licence, number) for number, source in enumerate(sources, 1))
    return Terms(base=name, licence=licence, texts=texts, notices=notices, data=data)


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()} if folder.is_dir() else {}
    return sorted(found)


def _is_apache(path: Path) -> bool:
    start = path.read_bytes()[:400]
    return b"Apache License" in start and b"Version 2.0" in start


def _data(source: Source, said: str | None, number: int) -> DataTerms:
    path = Path(source.path)
    texts = _files(path if path.is_dir() else path.parent, _TEXTS)
    text = texts[0] if texts and path.exists() else None
    place = f"data-licences/{number}-{text.name}" if text else ""
    licence = said or (f"its text is {place}" if text else "unknown")
    return DataTerms(source=source.path, licence=licence, text=text, place=place)


def refuse(terms: Terms, *, allow_unknown: bool) -> None:
    """Raise EnvironmentFault where the terms forbid a release, or are not known and that was not allowed."""
    faults = [
        Fault(f"its licence {one.licence!r} allows no derivatives", one.source, "train on other data to publish")
        for one in terms.data
        if any(part in one.licence.lower() for part in _NO_DERIVATIVES)
    ]
    if not allow_unknown:
        beside, go_on = "put its text beside it", "or give --allow-unknown-licence"
        for what in terms.missing():
            say = "say it with --data-licence, " if "of the data" in what else ""
            faults.append(Fault(what, "release", f"{say}{beside}, {go_on}"))
    if faults:
        raise EnvironmentFault.of(faults)


def write(terms: Terms, out: Path, changes: Sequence[str]) -> None:
    """LICENSE, NOTICE under the name that the licence demands, and the texts of the data's licences."""
    for path in (*_files(out, _TEXTS), *_files(out, ("NOTICE*", "Notice*"))):
        path.unlink()  # copied with the base's small files; written anew below
    if terms.texts:
        (out / "LICENSE").write_bytes(terms.texts[0].read_bytes())
    elif terms.licence and terms.licence.text:
        (out / "LICENSE").write_bytes((Path(families.__file__).parent / terms.licence.text).read_bytes())
    name = terms.licence.notice_file if terms.licence else "NOTICE"
    (out / name).write_text("\n".join(notice(terms, changes)) + "\n", encoding="utf-8")
    for one in terms.data:
        if one.text is not None:
            (out / one.place).parent.mkdir(exist_ok=True)
            (out / one.place).write_bytes(one.text.read_bytes())


def notice(terms: Terms, changes: Sequence[str]) -> list[str]:
    """The lines of the NOTICE: the sentence that the licence demands, what was changed, the data, what is missing."""
    lines = [terms.licence.notice, ""] if terms.licence and terms.licence.notice else []
    named = f"{terms.licence.name} ({terms.licence.id})" if terms.licence else "a licence that this tool does not know"
    lines += [f"This is a derivative of {terms.base}, which is under {named}.", "It was changed:", *changes, ""]
    if terms.licence:
        lines += [f"Whoever passes it on: {terms.licence.duties}.", ""]
    lines += ["It was trained on:", *(f"- {one.source}: licence {one.licence}" for one in terms.data)]
    if missing := terms.missing():
        lines += ["", "Not known when this was written:", *(f"- {what}" for what in missing)]
    for path in terms.notices:
        lines += [
            "",
            f"Notices of {terms.base} ({path.name}):",
            "",
            path.read_text(encoding="utf-8", errors="replace").rstrip(),
        ]
    return lines
