"""Make the dates task: a date written out in one of twelve languages, its ISO 8601 form as the answer.

    python data/dates/make.py               # writes train.jsonl, eval.jsonl, LICENSE and digests.json beside this file

Texts come from CLDR through babel. Every draw is an order of SHA-256 digests of the seed and a name, so the bytes hang
on the seed and on babel's locale data, not on a random generator.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from pathlib import Path

import babel
from babel.dates import format_date

HERE = Path(__file__).resolve().parent
LOCALES = ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "pl", "tr", "id")
FORMS = ("full", "long", "medium")
FIRST, LAST = date(1950, 1, 1), date(2049, 12, 31)
TRAIN_ROWS, EVAL_ROWS = 2400, 200
TASK = "Give the date in ISO 8601 form."
LICENSE_HEAD = """\
The rows in train.jsonl and eval.jsonl hold dates formatted with the locale data of Unicode CLDR, taken from the Python
package babel {version}. CLDR data is under the Unicode License v3 and babel under the BSD 3-Clause licence; both texts
follow as that package carries them. make.py, README.md and the choice of rows are part of this project (Apache-2.0).
"""

Kinds = dict[str, list[str]]  # the forms kept, by locale


def rank(seed: int, *parts: object) -> str:
    """A place in a shuffled order that is the same everywhere."""
    return hashlib.sha256(repr((seed, *parts)).encode()).hexdigest()


def calendar_years() -> list[int]:
    """One year of each of the fourteen kinds (first weekday, leap or not): together they hold every date's text."""
    years: dict[tuple[int, bool], int] = {}
    for year in range(FIRST.year, LAST.year + 1):
        start = date(year, 1, 1)
        years.setdefault((start.weekday(), (date(year + 1, 1, 1) - start).days == 366), year)
    return sorted(years.values())


def unambiguous() -> Kinds:
    """The forms of each locale whose text never means two dates, whichever of the locales it is read in.

    Every form shows the year in four digits, so two dates can share a text only within one year.
    """
    seen: dict[str, set[tuple[date, str, str]]] = defaultdict(set)
    for year in calendar_years():
        day = date(year, 1, 1)
        while day.year == year:
            for locale in LOCALES:
                for form in FORMS:
                    seen[format_date(day, form, locale=locale)].add((day, locale, form))
            day += timedelta(days=1)
    doubtful = set()
    for readings in seen.values():
        if len({day for day, _, _ in readings}) > 1:
            doubtful |= {(locale, form) for _, locale, form in readings}
    return {locale: [form for form in FORMS if (locale, form) not in doubtful] for locale in LOCALES}


def dates_by_month(seed: int) -> dict[int, Iterator[date]]:
    """All dates, month by month, each month in its own shuffled order; each date is used once over both files."""
    months: dict[int, list[date]] = defaultdict(list)
    day = FIRST
    while day <= LAST:
        months[day.month].append(day)
        day += timedelta(days=1)
    return {month: iter(sorted(days, key=lambda day: rank(seed, day))) for month, days in months.items()}


def rows_of(seed: int, split: str, count: int, kinds: Kinds, dates: dict[int, Iterator[date]]) -> list[str]:
    """``count`` JSON lines: locales in turn, within a locale forms in turn, within a form months in turn."""
    lines = []
    for index in range(count):
        locale, turn = LOCALES[index % len(LOCALES)], index // len(LOCALES)
        forms = kinds[locale]
        # The shift by locale spreads the months of the small split, where no locale comes round to all twelve.
        month = (turn // len(forms) + 5 * (turn % len(forms)) + 7 * (index % len(LOCALES))) % 12 + 1
        day = next(dates[month])
        text = format_date(day, forms[turn % len(forms)], locale=locale)
        turns = {"system": TASK, "user": text, "assistant": day.isoformat()}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    return sorted(lines, key=lambda line: rank(seed, split, line))


def licence_text() -> str:
    """Our note, then the two licence texts out of the installed babel."""
    from importlib.metadata import files

    texts = [LICENSE_HEAD.format(version=babel.__version__)]
    for wanted in ("LICENSE.unicode", "LICENSE"):
        found = next(path for path in files("babel") or [] if path.name == wanted)
        texts.append(found.read_text(encoding="utf-8").strip() + "\n")
    return f"\n{'-' * 80}\n\n".join(texts)


def make(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write the files into ``folder``; how many rows each data file has."""
    kinds, dates = unambiguous(), dates_by_month(seed)
    splits = {"train": TRAIN_ROWS, "eval": EVAL_ROWS}
    contents = {"LICENSE": licence_text()}
    for split, count in splits.items():
        contents[f"{split}.jsonl"] = "\n".join(rows_of(seed, split, count, kinds, dates)) + "\n"
    digests = {}
    for name, content in sorted(contents.items()):
        (folder / name).write_bytes(content.encode())
        digests[name] = hashlib.sha256(content.encode()).hexdigest()
    dropped = sorted(f"{locale} {form}" for locale in LOCALES for form in FORMS if form not in kinds[locale])
    record = {"babel": babel.__version__, "seed": seed, "dropped": dropped, "rows": splits, "sha256": digests}
    (folder / "digests.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return splits


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the dates task from babel's CLDR data.")
    parser.add_argument("--into", type=Path, default=HERE, help="the folder to write (default: this script's)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for split, count in make(options.into, options.seed).items():
        print(f"{split}.jsonl: {count} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
