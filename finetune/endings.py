"""What ends a text and a turn: generation config, tokenizer, chat template and GGUF must agree about it.

A model whose parts disagree answers well and never stops, or stops at once, depending on which program runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import Fault, ModelError
from finetune.runfolder import read_json
from finetune.terminal import clean

_CONTROL = 3
"""GGUF's type of a token that is never text."""


class End(NamedTuple):
    """A token that ends a text."""

    id: int
    token: str


def template(folder: Path) -> str | None:
    """The chat template that the tokenizer of this folder uses: the file goes before what tokenizer_config.json has."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    stored = (read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    return stored if isinstance(stored, str) else None


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer as tokenizer.json describes it, with its template; no model type puts its own split there."""
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer does not load: {error}", str(folder), "make the folder again") from None


def rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, answer: bool = False) -> str:
    """A conversation as the tokenizer's template writes it, and with ``answer`` what opens the next answer.

    Raises:
        ModelError: the template refuses it.
    """
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
    except (TemplateError, TypeError, ValueError) as error:
        raise ModelError(f"the chat template refuses a conversation: {clean(str(error))}", "chat_template") from None


def end_tokens(folder: Path) -> list[End]:
    """The tokens that end a text, the one that ends an answer first.

    Raises:
        ModelError: generation config, tokenizer and template do not agree about them.
    """
    tokenizer, path = tokenizer_of(folder), folder / "generation_config.json"
    stored = (read_json(path) or read_json(folder / "config.json") or {}).get("eos_token_id")
    ids = [stored] if isinstance(stored, int) else list(stored or [])
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if not ids or None in tokens:
        fix = "name the ids of the tokens that end a text there"
        raise ModelError(f"eos_token_id {stored} names no token: an answer would never end", str(path), fix)
    if tokenizer.eos_token not in tokens:
        what = f"eos_token_id does not name the tokenizer's end of a text, {tokenizer.eos_token}"
        raise ModelError(what, str(path), f"put {tokenizer.eos_token_id} among its ids")
    found = [End(*pair) for pair in zip(ids, tokens, strict=True)]
    if template(folder) is None:
        return found
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "42"}]
    after = rendered(tokenizer, turns).rpartition("42")[2].lstrip()
    written = [end for end in found if after.startswith(end.token)]
    if not written:
        what = f"the template ends an answer with {after[:40]!r}, which is none of the ends {', '.join(tokens)}"
        raise ModelError(what, str(path), "put the id of the token that ends an answer into eos_token_id")
    return [written[0], *[end for end in found if end != written[0]]]


def end_faults(path: Path, values: Mapping[str, Any], ends: Sequence[End]) -> list[Fault]:
    """What a GGUF's keys and values say otherwise than its model folder, whose ``end_tokens`` are ``ends``."""
    faults = []
    if (found := values.get("tokenizer.ggml.eos_token_id")) != ends[0].id:
        faults.append(Fault(f"it ends a text with token {found} where {ends[0].id} ends an answer", str(path)))
    turn = values.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn not in [end.id for end in ends]:
        faults.append(Fault(f"it ends a turn with token {turn}, which is no end of the model's", str(path)))
    types = values.get("tokenizer.ggml.token_type") or []
    plain = [end.token for end in ends if types[end.id : end.id + 1] != [_CONTROL]]
    return faults + [Fault(f"{token} is no control token there", str(path)) for token in plain]
