"""Rows that say nearly the same are found, others are not, whatever their length and language."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from finetune import similar
from finetune.conversation import TEXT, Conversation, ToolCall, Turn
from finetune.errors import EnvironmentFault
from finetune.similar import Similar

pytest.importorskip("rensa", reason="the extra data is not installed")

LETTERS = "eeeettaaooinnsshrrdllucmfwyg"


class Writer:
    """Makes texts of invented words, some of them frequent, as in a language."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.words = ["".join(self.chance.choices(LETTERS, k=self.chance.randint(2, 9))) for _ in range(3000)]

    def text(self, words: int) -> str:
        return " ".join(self.words[int(self.chance.paretovariate(0.3)) % 3000] for _ in range(words))

    def changed(self, text: str, words: int) -> str:
        """The text with so many words replaced."""
        new = text.split()
        for place in self.chance.sample(range(len(new)), words):
            new[place] = "zq" + self.chance.choice(self.words)
        return " ".join(new)


def whole(text: str) -> similar.Pair:
    return text, text


def near(one: similar.Pair, other: similar.Pair) -> bool:
    return Similar().add_many([1, 2], [one, other])[1] == 1


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_every_planted_copy_is_found_and_nothing_else(kind: str) -> None:
    writer = Writer(1)
    rows = [whole(writer.text(120)) if kind == "text" else (writer.text(40), writer.text(80)) for _ in range(3000)]
    copied = writer.chance.sample(range(3000), 300)
    for place in copied:
        asked, answered = rows[place]
        asked_again = writer.changed(asked, 3 if kind == "text" else 1)
        rows.append((asked_again, asked_again if kind == "text" else writer.changed(answered, 2)))
    numbers = range(10, 10 + len(rows))
    assert Similar().add_many(numbers, rows) == [None] * 3000 + [10 + place for place in copied]


def test_half_the_words_are_too_many() -> None:
    writer = Writer(2)
    texts = [writer.text(100) for _ in range(200)]
    found = Similar().add_many(range(400), [whole(text) for text in (*texts, *(writer.changed(t, 25) for t in texts))])
    assert found == [None] * 400


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("What is the capital of France, and how many people live there?",
         "what is the capital of  France and how many people live there", True),
        ("What is the capital of France, and how many people live there?",
         "What is the capital of Norway, and how many people live there?", False),
        ("Please write a short poem about the sea in winter for my grandmother.",
         "Please write a short poem about the sea in winter for my grandmothers!", True),
        ("Yes.", "No.", False), ("Yes.", "yes", True), ("A", "B", False), ("", "", True), ("", "Something", False),
        ("今天天气很好，我们打算下午一起去公园散步，然后在湖边的小店里喝一杯热茶，再慢慢走回家。",
         "今天天气很好，我们打算下午一起去公园散步，然后在湖边的小店里喝一杯热茶，再慢慢走回家吧", True),
        ("今天天气很好，我们打算下午一起去公园散步，然后在湖边的小店里喝一杯热茶。",
         "明天可能会下雨，我们打算上午留在家里看书，然后在厨房里做一顿简单的午饭。", False),
        ("👋🏽 Hallo! Wie geht es dir heute, lieber Freund?", "👋🏽 hallo! Wie geht es dir heute, lieber Freund", True),
    ],
)  # fmt: skip
def test_short_texts(one: str, other: str, expected: bool) -> None:
    assert near(whole(one), whole(other)) is expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [(("2021-05-03", "2021-05-04"), False), (("2021-05-03", "1998-12-30"), False), (("2021-05-03",) * 2, True)],
)
def test_both_parts_must_be_near(answers: tuple[str, str], expected: bool) -> None:
    """One template filled with other dates is no copy, however long it is."""
    template = (
        "Read the following sentence with care, and write the date that it names as an ISO date: it was 0{} May 2021"
    )
    one, other = ((template.format(day), answer) for day, answer in zip("34", answers, strict=True))
    assert near(one, other) is expected
    assert near((answers[0], one[0]), (answers[1], other[0])) is expected


def test_the_same_question_does_not_hide_another_answer() -> None:
    writer = Writer(8)
    rows = [(writer.text(40), writer.text(40)) for _ in range(200)]
    index = Similar()
    index.add_many(range(200), rows)
    found = index.find_many([(asked, writer.changed(answered, 6)) for asked, answered in rows])
    assert sum(number is not None for number in found) < 20  # estimates: a few come out too high


def test_a_data_set_of_templates_has_no_copies(dates: Path) -> None:
    rows = [json.loads(line)["messages"] for line in (dates / "train.jsonl").read_text().splitlines()]
    pairs = [(row[1]["content"], row[2]["content"]) for row in rows]
    assert not any(number is not None for number in Similar().add_many(range(len(pairs)), pairs))


def test_a_copy_is_found_among_many_rows_of_one_template() -> None:
    writer = Writer(3)
    template = writer.text(60)
    rows = [(f"{template} {writer.text(40)}", writer.chance.choice(["good", "bad"])) for _ in range(4000)]
    copied = writer.chance.sample(range(4000), 40)
    again = [(writer.changed(rows[place][0], 1), rows[place][1]) for place in copied]
    index = Similar()
    index.add_many(range(4000), rows)
    assert index.find_many(again) == copied


def test_looking_remembers_nothing_and_the_nearest_is_named() -> None:
    writer = Writer(4)
    text = writer.text(100)
    rows = [whole(writer.changed(text, 5)), whole(writer.changed(text, 1)), whole(writer.text(100))]
    index = Similar()
    assert index.find_many([whole(text)]) == [None]
    index.add_many([7, 8, 9], rows)
    assert index.find_many([whole(text), whole(writer.text(100))]) == [8, None]
    assert index.find_many([whole(text)]) == [8]
    assert len(index) == 3
    assert index.add_many([], []) == []
    assert index.add_many([5, 6], [rows[2], rows[2]]) == [9, 9]  # of two that are as near, the earlier


def test_batches_change_nothing() -> None:
    writer = Writer(5)
    rows: list[similar.Pair] = []
    for _ in range(6000):
        again = rows and writer.chance.random() < 0.1
        rows.append(whole(writer.changed(writer.chance.choice(rows)[0], 1) if again else writer.text(20)))
    rows[100] = whole(writer.text(30_000))
    at_once = Similar().add_many(range(6000), rows)
    index, found = Similar(), list[int | None]()
    for start in range(0, 6000, 37):
        found += index.add_many(range(start, min(start + 37, 6000)), rows[start : start + 37])
    assert found == at_once
    assert 400 < sum(number is not None for number in found) < 700


def test_another_process_finds_the_same() -> None:
    code = (
        "from tests.test_similar import Writer, whole; from finetune.similar import Similar; w = Writer(6);"
        "t = [w.text(30) for _ in range(300)]; t += [w.changed(x, 2) for x in t];"
        "print(Similar().add_many(range(600), [whole(x) for x in t]))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]
    assert said[0].count("None") < 600


def test_memory_is_a_few_hundred_bytes_a_row() -> None:
    writer = Writer(7)
    rows = [whole(writer.text(10)) for _ in range(20_500)]
    index = Similar()
    index.add_many(range(500), rows[:500])
    tracemalloc.start()
    try:
        for start in range(500, 20_500, 500):
            index.add_many(range(start, start + 500), rows[start : start + 500])
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held / 20_000 < 600  # room for 32,768 rows


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert similar.available()
    monkeypatch.setattr(similar, "find_spec", lambda name: None)
    assert not similar.available()
    with pytest.raises(EnvironmentFault, match=r"finetune-qwen\[data\]"):
        Similar()


def test_the_parts_of_a_row() -> None:
    system, user, answer = Turn("system", "Be brief."), Turn("user", "Hi"), Turn("assistant", "Hello")
    assert similar.parts(Conversation((system, user, answer))) == ("Hi", "Hello")
    assert similar.parts(Conversation((user, answer, user, answer))) == ("Hi\nHello\nHi", "Hello")
    assert similar.parts(Conversation((system, answer))) == ("Be brief.", "Hello")
    assert similar.parts(Conversation((answer,))) == ("Hello", "Hello")
    asked, answered = similar.parts(Conversation((Turn(TEXT, "Once upon a time"),)))
    assert asked is answered == "Once upon a time"
    ranked = Conversation((user, answer), rejected=(user, Turn("assistant", "Go away")))
    assert similar.parts(ranked) == ("Hi", "Hello\nGo away")
    call = Turn("assistant", "", thinking="Look it up", calls=(ToolCall("find", {"b": 1, "a": [2]}),))
    assert similar.parts(Conversation((user, call))) == ("Hi", 'Look it up\nfind {"a": [2], "b": 1}')
