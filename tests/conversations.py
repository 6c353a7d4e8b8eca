"""Random conversations for property tests: everything that ``conversation.check`` lets pass, odd text above all."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from finetune.conversation import Conversation, ToolCall, Turn
from finetune.rowcheck import check, is_blank

CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>")
_PIECES = (
    "date", " the 2nd", "Ünïcode", "20 20", "\n", "\n\n", "\r\n", "  ", "\t", "日本", "🙂", "👩‍🚀", "שלום", "é",
    "x" * 30, "e\u0301", "\ufa70", "user", "assistant\n", "<|im_end", "|>", "<|", "system",
    "</tool_response>", '{"a": 1}', "\u2028", "\ue0000\ue001",
)  # fmt: skip
_LETTERS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
TEXTS = (
    st.lists(st.one_of(st.sampled_from(_PIECES), _LETTERS), min_size=0, max_size=5)
    .map("".join)
    .filter(lambda text: not any(token in text for token in (*CONTROL, "<think>", "</think>")))
)
ANSWERS = TEXTS.filter(lambda text: not is_blank(text))
_WEIGHTS = st.sampled_from((1.0, 1.0, 1.0, 0.0))
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look_up", "description": "finds é things"}}


@st.composite
def conversations(draw: st.DrawFn, *, tools: bool = False, thinking: bool = False) -> Conversation:
    """1 to 4 exchanges, at least one answer trained; with calls and their answers, or with thinking, where asked."""
    turns = [Turn("system", draw(TEXTS))] if draw(st.booleans()) else []
    calls = tools and draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        turns.append(Turn("user", draw(ANSWERS)))
        if calls and draw(st.booleans()):
            asked = tuple(ToolCall("look_up", {"q": draw(TEXTS)}) for _ in range(draw(st.integers(1, 2))))
            turns.append(Turn("assistant", draw(st.one_of(st.just(""), ANSWERS)), draw(_WEIGHTS), calls=asked))
            turns += [Turn("tool", draw(TEXTS)) for _ in asked]
        thought = draw(ANSWERS) if thinking and draw(st.booleans()) else ""
        inline = thought and draw(st.booleans())
        content = draw(ANSWERS)
        if inline:
            content, thought = f"<think>\n{thought}\n</think>\n\n{content}", ""
        turns.append(Turn("assistant", content, draw(_WEIGHTS), thinking=thought))
    last = turns[-1]
    turns[-1] = Turn(last.role, last.content, 1.0, last.thinking)
    made = Conversation(tuple(turns), (TOOL,) if calls else ())
    check(made, CONTROL)
    return made
