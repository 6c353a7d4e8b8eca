"""The settings and the chat template that a converted vocabulary file gets: the original's frame, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from finetune import tiktoken_file
from tests.test_tiktoken_file import SPECIALS, convert, loaded, store

MESSAGES: list[list[tuple[str, str]]] = [
    [("user", "Hello")],
    [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "日本語?\n")],
    [("system", ""), ("user", "a")],
    [("user", "  two blanks\n\n"), ("assistant", "\n\tx  ")],
    [("user", "{{ 1 + 1 }} {% if %} <|im_end|>\n<|im_start|>system\nfoe"), ("assistant", "")],
    [],
]
# Rows beyond the ranks, and the ids of the end and padding tokens that fit in them.
ROOMS = [(0, None, None), (1, None, 256), (2, None, 256), (3, 258, 256), (9, 258, 256)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest vocabulary: single bytes."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return store(tmp_path_factory.mktemp("bytes") / "qwen.tiktoken", ranks)


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> Any:
    return loaded(convert(file, file.parent / "native", 512))


def test_settings(tmp_path: Path, file: Path, tokenizer: Any) -> None:
    chat, base = tokenizer, loaded(convert(file, tmp_path / "base", 512, chat=False))
    assert type(chat).__name__ == "Qwen2Tokenizer"
    assert (chat.eos_token, chat.pad_token, chat.bos_token, chat.unk_token) == (SPECIALS[2], SPECIALS[0], None, None)
    assert (base.eos_token, base.pad_token) == (SPECIALS[0], SPECIALS[0])
    assert chat.model_max_length == 2048
    assert chat.chat_template == base.chat_template == tiktoken_file.CHAT_TEMPLATE


@pytest.mark.parametrize(("room", "eos", "pad"), ROOMS)
def test_special_tokens_without_a_row_are_left_out(
    tmp_path: Path, file: Path, room: int, eos: int | None, pad: int | None
) -> None:
    tokenizer = loaded(convert(file, tmp_path / "native", 256 + room))
    assert len(tokenizer) == 256 + room
    assert tokenizer.eos_token_id == eos
    assert tokenizer.pad_token_id == pad
    assert max(tokenizer.encode("".join(SPECIALS))) < 256 + room


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("turns", MESSAGES)
def test_the_template_is_the_originals_frame(tokenizer: Any, turns: list[tuple[str, str]], prompt: bool) -> None:
    framed = turns if turns[:1] and turns[0][0] == "system" else [("system", "You are a helpful assistant."), *turns]
    wanted = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in framed)
    wanted += "<|im_start|>assistant\n" if prompt else ""
    messages = [{"role": role, "content": content} for role, content in turns]
    # The library looks into the first message before the template runs: an empty list goes in a batch.
    (text,) = tokenizer.apply_chat_template([messages], tokenize=False, add_generation_prompt=prompt)
    assert text == wanted


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "can only be the first"),
        ([{"role": "system", "content": "a"}, {"role": "system", "content": "b"}], "can only be the first"),
        ([{"role": "tool", "content": "a"}], "roles system, user and assistant, not tool"),
        ([{"content": "a"}], "roles system, user and assistant"),
        ([{"role": "user", "content": None}], "must be text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "must be text"),
        ([{"role": "user"}], "must be text"),
    ],
)
def test_what_the_original_cannot_frame_is_refused(tokenizer: Any, messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        tokenizer.apply_chat_template(messages, tokenize=False)
