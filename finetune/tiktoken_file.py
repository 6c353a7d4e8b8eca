"""The original Qwen's vocabulary file → the files of a Hugging Face tokenizer that gives the same ids.

``qwen.tiktoken`` lists tokens as bytes with their ranks, and nothing else: which two pieces a token is merged from, how
text is split before merging, the special tokens and the chat's frame are all in the original's Python code. That code
is never run; what it says is written out here.

Sources: the model's own tokenization_qwen.py and qwen_generation_utils.py (``make_context``); the Qwen repository's
tokenization note.
"""

from __future__ import annotations

import json
from base64 import b64encode
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from finetune import manifest
from finetune.errors import ModelError
from finetune.runfolder import json_bytes, write_synced

KNOWN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
"""Of the published ``qwen.tiktoken``: 151,643 ranks; the same file for 7B, 14B and 72B, base and chat."""

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END, START, STOP, *(f"<|extra_{index}|>" for index in range(205)))
"""In the order of their ids, which follow the last rank."""

# Single digits, whatever GPT-4's pattern does; Qwen2Tokenizer has the same one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The system block is always there, an empty one too. Contents are framed as they are: trimming would change the ids.
CHAT_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('this model knows the roles system, user and assistant, not ' ~ message.role) -}}
    {%- elif message.role == 'system' and not loop.first -%}
        {{- raise_exception('a system message can only be the first one') -}}
    {%- elif message.content is not string -%}
        {{- raise_exception('the content of a message must be text') -}}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_MAX_FILE = 64 * 1024 * 1024
_MAX_TOKEN = 256  # bytes; the published file's longest has 128, and the work on one grows with its square
_MAX_DIGITS = 7
_AGAIN = "fetch the vocabulary file again"
_SPECIAL_BYTES = frozenset(token.encode() for token in SPECIALS)


def is_published(path: Path) -> bool:
    """Whether this is byte for byte the vocabulary file of the published models."""
    return manifest.digest(path) == KNOWN_SHA256


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token → rank, in the file's order. The ranks are 0, 1, 2 … without a gap, and every single byte is a token.

    Raises:
        ModelError: the file is not that, with its first bad line.
    """
    try:
        if path.stat().st_size > _MAX_FILE:
            raise ModelError("larger than 64 MB: this is no vocabulary file", str(path), _AGAIN)
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ModelError(f"the vocabulary cannot be read: {error.strerror}", str(path), _AGAIN) from None
    if lines[-1] == b"":
        lines.pop()
    ranks: dict[bytes, int] = {}
    line_of: dict[int, int] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        token, rank = _read_line(line, where)
        if token in ranks:
            raise ModelError(f"this token stands already in line {line_of[ranks[token]]}", where, _AGAIN)
        if rank in line_of:
            raise ModelError(f"rank {rank} stands already in line {line_of[rank]}", where, _AGAIN)
        ranks[token] = rank
        line_of[rank] = number
    _refuse_gaps(ranks, line_of, path)
    return ranks


def _read_line(line: bytes, where: str) -> tuple[bytes, int]:
    code, _, digits = line.partition(b" ")
    try:
        token = a2b_base64(code, strict_mode=True)
    except Base64Error:
        token = b""
    rank = int(digits) if digits.isdigit() and len(digits) <= _MAX_DIGITS else -1
    # A second spelling of the same token or rank is damage too: hence the way back.
    if not token or rank < 0 or b64encode(token) + b" %d" % rank != line:
        shown = line[:40].decode("ascii", "backslashreplace")
        raise ModelError(f"not a line of base64, one blank and a rank: {shown!r}", where, _AGAIN)
    if len(token) > _MAX_TOKEN:
        raise ModelError(f"a token of {len(token)} bytes; {_MAX_TOKEN} are the most", where, _AGAIN)
    if token in _SPECIAL_BYTES:
        raise ModelError(f"{token.decode()} is a special token and has no rank", where, _AGAIN)
    return token, rank


def _refuse_gaps(ranks: dict[bytes, int], line_of: dict[int, int], path: Path) -> None:
    gap = next((rank for rank in range(len(ranks)) if rank not in line_of), None)
    if gap is not None:
        after = min(rank for rank in line_of if rank > gap)
        raise ModelError(f"no token has rank {gap}, but this one has {after}", f"{path}:{line_of[after]}", _AGAIN)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        what = f"{len(missing)} single bytes are no tokens, the first is 0x{missing[0]:02x}"
        raise ModelError(what, str(path), _AGAIN)


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of several bytes, in the order of their ranks.

    Raises:
        ModelError: a token that no merge makes; encoding by ranks and by merges would then differ.
    """
    found = []
    for token, rank in sorted(ranks.items(), key=itemgetter(1)):
        if len(token) == 1:
            continue
        halves = _halves(token, rank, ranks)
        if len(halves) > 2:
            what = f"no merge of two tokens with lower ranks makes {token[:40]!r}"
            raise ModelError(what, f"rank {rank} of the vocabulary", _AGAIN)
        found.append((halves[0], halves[1]))
    return found


def _halves(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """What byte-pair encoding makes of a token's own bytes with only the ranks below its own: the two pieces that it is
    merged from, or more where it cannot be reached."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= rank:
            break
        at = pairs.index(lowest)  # of equals the leftmost
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def tokenizer_json(ranks: dict[bytes, int], vocab_rows: int) -> dict[str, Any]:
    """The content of ``tokenizer.json``. Special tokens that have none of the ``vocab_rows`` embedding rows are left
    out.

    Raises:
        ModelError: as ``merges``.
    """
    letters = _letters()
    spelled = {token: token.decode("latin-1").translate(letters) for token in ranks}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(ranks) + index,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, token in enumerate(_specials(len(ranks), vocab_rows))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
                _byte_level(use_regex=False),
            ],
        },
        "post_processor": None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelled[token]: rank for token, rank in sorted(ranks.items(), key=itemgetter(1))},
            "merges": [[spelled[left], spelled[right]] for left, right in merges(ranks)],
        },
    }


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _letters() -> dict[int, int]:
    """Byte → code point of the visible letter that stands for it in a byte-level vocabulary (GPT-2's alphabet):
    printable Latin-1 is itself, the others follow from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: byte for byte in shown} | {byte: 0x100 + index for index, byte in enumerate(hidden)}


def _specials(first: int, vocab_rows: int) -> tuple[str, ...]:
    return SPECIALS[: max(vocab_rows - first, 0)]


def settings(template: str, *, max_length: int, chat: bool, specials: Sequence[str] = SPECIALS) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``. A token that is not among ``specials`` is named as nothing, or the
    library would add it beyond the embedding's rows."""
    ends = STOP if chat else END
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": ends if ends in specials else None,
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": END if END in specials else None,
        "split_special_tokens": False,
        "unk_token": None,
    }


def write(folder: Path, vocabulary: Path, *, vocab_rows: int, max_length: int, chat: bool) -> None:
    """Make the tokenizer's files in ``folder``: tokenizer.json, tokenizer_config.json, chat_template.jinja.

    Raises:
        ModelError: as ``read_ranks`` and ``merges``; or more tokens than embedding rows.
    """
    ranks = read_ranks(vocabulary)
    if len(ranks) > vocab_rows:
        what = f"the vocabulary has {len(ranks)} tokens but the model has only {vocab_rows} embedding rows"
        raise ModelError(what, str(vocabulary), "vocabulary and weights belong to two models")
    # On one line: indented, the merges alone would take six hundred thousand.
    text = json.dumps(tokenizer_json(ranks, vocab_rows), ensure_ascii=False, separators=(",", ":"))
    specials = _specials(len(ranks), vocab_rows)
    config = settings(CHAT_TEMPLATE, max_length=max_length, chat=chat, specials=specials)
    write_synced(folder / "tokenizer.json", text.encode())
    write_synced(folder / "tokenizer_config.json", json_bytes(config))
    write_synced(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())
