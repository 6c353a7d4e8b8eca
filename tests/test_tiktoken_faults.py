"""What is refused: damaged vocabulary files, and tokens that no merge reaches."""

from __future__ import annotations

import random
from base64 import b64encode
from pathlib import Path

import pytest

from finetune import tiktoken_file
from finetune.errors import ModelError
from tests.test_tiktoken_file import replay

BYTES = b"".join(b"%s %d\n" % (b64encode(bytes([byte])), byte) for byte in range(256))


@pytest.mark.parametrize(
    ("data", "line", "what"),
    [
        *[(BYTES + bad + b"\n", 257, "not a line of base64") for bad in (
            b"", b"YWI=", b"YWI=256", b"YWI= ", b" 256", b"YWI=  256", b"YWI= 256 ", b"YWI= 256\r", b"YWI= -1",
            b"YWI= +256", b"YWI= 0256", b"YWI= 2_56", b"YWI= 25.6", b"YWI= 99999999", b"YWI 256", b"Y!I= 256",
            b"YWJ= 256", b"YWI=\t256", b"YWI= 256 257", b"<html>", b"\xff\xfe", b"=== 256",
        )],
        (BYTES + b"IQ== 256\n", 257, "this token stands already in line 34"),
        (BYTES + b"YWI= 7\n", 257, "rank 7 stands already in line 8"),
        (BYTES + b"YWI= 257\n", 257, "no token has rank 256, but this one has 257"),
        (BYTES + b"YWI= 300\nYWJj 257\n", 258, "no token has rank 256, but this one has 257"),
        (BYTES + b"%s 256\n" % b64encode(b"a" * 257), 257, "a token of 257 bytes; 256 are the most"),
        (BYTES + b"%s 256\n" % b64encode(b"<|im_end|>"), 257, r"<\|im_end\|> is a special token"),
        (b"\n".join(BYTES.splitlines()[:200]), None, "56 single bytes are no tokens, the first is 0xc8"),
        (b"", None, "256 single bytes are no tokens, the first is 0x00"),
        (b"version https://git-lfs.github.com/spec/v1\n", 1, "not a line of base64"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path, data: bytes, line: int | None, what: str) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=what) as caught:
        tiktoken_file.read_ranks(path)
    (fault,) = caught.value.faults
    assert fault.where == (str(path) if line is None else f"{path}:{line}")
    assert fault.fix


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        tiktoken_file.read_ranks(tmp_path / "absent")
    file = tmp_path / "qwen.tiktoken"
    file.write_bytes(BYTES)
    with pytest.raises(ModelError, match=r"has 256 tokens .* only 100 embedding rows"):
        tiktoken_file.write(tmp_path, file, vocab_rows=100, max_length=1, chat=True)
    assert list(tmp_path.iterdir()) == [file]
    with (tmp_path / "big").open("wb") as big:
        big.truncate(64 * 1024 * 1024 + 1)
    with pytest.raises(ModelError, match="larger than 64 MB"):
        tiktoken_file.read_ranks(tmp_path / "big")


def test_each_merge_is_the_last_of_a_replay_and_what_has_none_is_refused() -> None:
    """On random vocabularies of two letters, where tokens overlap as they can and many are out of reach."""
    refused = 0
    for seed in range(400):
        source = random.Random(seed)
        pieces = [b"a", b"b"]
        for _ in range(source.randint(1, 9)):
            pieces += {source.choice(pieces) + source.choice(pieces)} - set(pieces)
        order = pieces[2:]
        ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + at for at, token in enumerate(order)}
        last_steps = [replay(token, ranks, ranks[token]) for token in order]
        if all(len(step) == 2 for step in last_steps):
            assert tiktoken_file.merges(ranks) == [tuple(step) for step in last_steps]
        else:
            first = next(token for token, step in zip(order, last_steps, strict=True) if len(step) > 2)
            with pytest.raises(ModelError, match=f"no merge .* makes {first!r}") as caught:
                tiktoken_file.merges(ranks)
            assert caught.value.faults[0].where == f"rank {ranks[first]} of the vocabulary"
            refused += 1
    assert 50 < refused < 350, refused
