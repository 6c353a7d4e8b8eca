from __future__ import annotations

from typing import Any

import pytest

from finetune.conversation import ROLES, Conversation, RowFault, Turn, nearest, role_of, shown, text_of
from finetune.rowcheck import check

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def turns(*pairs: tuple[Any, Any]) -> Conversation:
    return Conversation(tuple(Turn(role, content) for role, content in pairs))


GOOD = [
    turns(("user", "a"), ("assistant", "b")),
    turns(("system", ""), ("user", "a"), ("assistant", "b")),
    turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
    turns(("user", "a"), ("assistant", "b"), ("tool", "1"), ("tool", "2"), ("assistant", "d")),
    turns(("user", "im_end <| im_start |> <s> ✓ 🎉 \x07"), ("assistant", "a\n\nb")),
    Conversation((Turn("user", "a"), Turn("assistant", "b", 0.0), Turn("user", "c"), Turn("assistant", "d"))),
]

BAD = [
    (turns(), "turns", "no turn at all"),
    (turns(("user", "a")), "turns", "no assistant turn"),
    (turns(("system", "a"), ("user", "b")), "turns", "no assistant turn"),
    (turns(("user", "a"), ("assistant", "")), "turn 2 (assistant)", "empty"),
    (turns(("user", ""), ("assistant", "b")), "turn 1 (user)", "question is empty"),
    (turns(("user", "\n\u200b"), ("assistant", "b")), "turn 1 (user)", "question is empty"),
    (turns(("user", "a"), ("assistant", " \n\t")), "turn 2 (assistant)", "empty"),
    (turns(("user", "a"), ("assistant", " \u200b\ufeff\u3164")), "turn 2 (assistant)", "empty"),
    (turns(("user", "a"), ("asistant", "b")), "turn 2", "did you mean 'assistant'"),
    (turns(("human", "a"), ("assistant", "b")), "turn 1", "did you mean 'user'"),
    (turns((None, "a"), ("assistant", "b")), "turn 1", "unknown role None"),
    (turns(("user", "a"), ("user", "b"), ("assistant", "c")), "turn 2 (user)", "two user turns running"),
    (turns(("user", "a"), ("assistant", "b"), ("assistant", "c")), "turn 3 (assistant)", "two assistant turns"),
    (turns(("assistant", "a"), ("user", "b"), ("assistant", "c")), "turn 1 (assistant)", "opens with"),
    (turns(("system", "a"), ("assistant", "b")), "turn 2 (assistant)", "right after the system"),
    (turns(("user", "a"), ("system", "b"), ("assistant", "c")), "turn 2 (system)", "must come first"),
    (turns(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")), "turn 2 (system)", "come first"),
    (turns(("user", "a"), ("tool", "b"), ("assistant", "c")), "turn 2 (tool)", "right after the user"),
    (turns(("user", "a"), ("assistant", "b"), ("user", "c")), "turn 3 (user)", "nothing answers it"),
    (turns(("user", "a"), ("assistant", "b"), ("tool", "c")), "turn 3 (tool)", "nothing answers it"),
    (Conversation((Turn("user", "a"), Turn("assistant", "b", 0.0))), "turns", "weight 0"),
    (turns(("user", None), ("assistant", "b")), "turn 1 (user)", "is null"),
    (turns(("user", 7), ("assistant", "b")), "turn 1 (user)", "is int 7"),
    (turns(("user", ["a"]), ("assistant", "b")), "turn 1 (user)[0]", "not a part"),
    (turns(("user", "a"), ("assistant", "Hello <think>x</think> bye")), "turn 2 (assistant)", "not one block"),
    (turns(("user", "a"), ("assistant", "<think>x</think> b <think>y</think> c")), "turn 2 (assistant)", "one block"),
    (Conversation((Turn("user", "a"), Turn("assistant", "b", thinking="x </think> y"))), "turn 2 (assistant)", "block"),
    (turns(("user", "a\ud800b"), ("assistant", "b")), "turn 1 (user)", "surrogate pair ('\\ud800') at 1"),
    (turns(("user", "a"), ("assistant", "b\0")), "turn 2 (assistant)", "NUL character at 1"),
    (
        turns(("user", "x<|im_end|>\n<|im_start|>assistant\n"), ("assistant", "b")),
        "turn 1 (user)",
        "'<|im_end|>' as text at 1",
    ),
    (turns(("user", "a"), ("assistant", "b<|endoftext|>")), "turn 2 (assistant)", "'<|endoftext|>' as text at 1"),
]


@pytest.mark.parametrize("conversation", GOOD)
def test_good_conversations_pass(conversation: Conversation) -> None:
    check(conversation, SPECIALS)


@pytest.mark.parametrize(("conversation", "column", "what"), BAD)
def test_bad_conversations_are_refused(conversation: Conversation, column: str, what: str) -> None:
    with pytest.raises(RowFault) as caught:
        check(conversation, SPECIALS)
    assert caught.value.column == column
    assert what in str(caught.value)
    assert caught.value.fix
    assert str(caught.value).isprintable()


def test_special_tokens_are_the_callers() -> None:
    check(turns(("user", "<|im_start|>"), ("assistant", "b")), ())
    check(turns(("user", "a"), ("assistant", "b")), [""])


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", "a"), ("", ""), ([], ""), ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab")],
)
def test_text_of(value: object, text: str) -> None:
    assert text_of(value, "content") == text


@pytest.mark.parametrize(
    ("value", "column", "what"),
    [
        (None, "content", "null"),
        (True, "content", "bool True"),
        (1.5, "content", "float 1.5"),
        ({"text": "a"}, "content", "dict"),
        ([None], "content[0]", "not a part"),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "x"}], "content[1]", "type 'image_url'"),
        ([{"text": "a"}], "content[0]", "type None"),
        ([{"type": "text", "text": None}], "content[0].text", "None, not a text"),
    ],
)
def test_text_of_refuses(value: object, column: str, what: str) -> None:
    with pytest.raises(RowFault, match=what) as caught:
        text_of(value, column="content")
    assert caught.value.column == column


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("asistant", "did you mean 'assistant'?"),
        ("User ", "did you mean 'user'?"),
        ("gpt", "did you mean 'assistant'?"),
        ("developer", "did you mean 'system'?"),
        ("zzz", "use one of system, user, assistant, tool"),
    ],
)
def test_nearest(word: str, advice: str) -> None:
    assert nearest(word, ROLES) == advice


def test_role_of_maps_a_formats_words() -> None:
    assert role_of("human", "from", {"human": "user"}) == "user"
    with pytest.raises(RowFault, match="use one of human"):
        role_of("zzz", "from", {"human": "user"})
    with pytest.raises(RowFault, match="not a role"):
        role_of(["user"], "from")


def test_shown_is_short_and_printable() -> None:
    text = shown("\x1b[31m\u202e" + "x y " * 30)
    assert text.isprintable()
    assert len(text) == 40
    assert "a1B2a1B2" not in shown("hf_" + "a1B2" * 8)  # it may be somebody's key


def test_a_fault_prints_column_what_and_fix() -> None:
    assert str(RowFault("a", "b", code="x")) == "a: b"
    assert str(RowFault("a", "b", "c", code="x")) == "a: b; c"
