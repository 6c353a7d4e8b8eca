"""Generation config, tokenizer, template and GGUF must name the same ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune import endings
from finetune.errors import ModelError


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_end_of_an_answer_comes_first(folder: Path) -> None:
    found = endings.end_tokens(folder)
    assert [end.token for end in found] == ["<|im_end|>", "<|endoftext|>"]
    change(folder / "generation_config.json", eos_token_id=[end.id for end in reversed(found)])
    assert endings.end_tokens(folder) == found  # the template says which of them ends an answer


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        ([], "an answer would never end"),
        (None, "an answer would never end"),
        ([9999], "an answer would never end"),
        (["<|endoftext|>"], "does not name the tokenizer's end of a text, <|im_end|>"),
    ],
)
def test_parts_that_disagree_are_refused(folder: Path, ids: list[Any] | None, what: str) -> None:
    known = {end.token: end.id for end in endings.end_tokens(folder)}
    change(folder / "generation_config.json", eos_token_id=ids and [known.get(one, one) for one in ids])
    with pytest.raises(ModelError) as raised:
        endings.end_tokens(folder)
    assert what in str(raised.value)


def test_a_template_that_ends_otherwise_is_refused(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_start|>"))
    with pytest.raises(ModelError, match=r"the template ends an answer with '<\|im_start\|>"):
        endings.end_tokens(folder)
    path.write_text("{{ raise_exception('not today') }}")
    with pytest.raises(ModelError, match="not today"):
        endings.end_tokens(folder)
    path.unlink()  # a base without turns ends where its generation config says
    assert endings.end_tokens(folder)[0].token == "<|im_end|>"


def test_the_template_file_goes_before_the_setting(folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template="of the settings")
    assert (endings.template(folder) or "").startswith("{%- if messages[0].role")
    assert endings.tokenizer_of(folder).chat_template == endings.template(folder)
    (folder / "chat_template.jinja").unlink()
    assert endings.template(folder) == "of the settings"


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({}, []),
        ({"tokenizer.ggml.eos_token_id": 0}, ["ends a text with token 0"]),
        ({"tokenizer.ggml.eos_token_id": None}, ["ends a text with token None"]),
        ({"tokenizer.ggml.eot_token_id": 1}, ["ends a turn with token 1"]),
        ({"tokenizer.ggml.token_type": [1] * 320}, ["<|im_end|> is no control", "<|endoftext|> is no control"]),
    ],
)
def test_a_gguf_that_ends_otherwise_is_named(folder: Path, values: dict[str, Any], what: list[str]) -> None:
    ends = endings.end_tokens(folder)
    types = [3 if index in [end.id for end in ends] else 1 for index in range(320)]
    said = {"tokenizer.ggml.eos_token_id": ends[0].id, "tokenizer.ggml.token_type": types} | values
    faults = endings.end_faults(folder / "model.gguf", said, ends)
    assert len(faults) == len(what)
    assert all(part in str(fault) for part, fault in zip(what, faults, strict=True))
