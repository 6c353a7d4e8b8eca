"""The original's vocabulary file, judged before anything is loaded."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from finetune import tokens

STOPS = ("<|im_end|>",)


def vocabulary(folder: Path, more: int = 0) -> Path:
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    lines += [base64.b64encode(b"a" * (2 + index)) + b" %d" % (256 + index) for index in range(more)]
    path = folder / tokens.VOCABULARY
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_a_small_vocabulary_names_the_stop_token(tmp_path: Path) -> None:
    vocabulary(tmp_path)
    assert tokens.judge(tmp_path, 259, STOPS, "original") == ("<|im_end|>", [])
    stop, faults = tokens.judge(tmp_path, 258, STOPS, "original")  # the stop token would lie beyond the rows
    assert (stop, len(faults)) == ("", 1)


@pytest.mark.parametrize(
    ("rows", "what"),
    [(152_064, "not the published vocabulary file"), (255, "has 256 tokens but the model has only 255")],
)
def test_one_that_belongs_to_another_model_is_refused(rows: int, what: str, tmp_path: Path) -> None:
    path = vocabulary(tmp_path)
    _, (fault,) = tokens.judge(tmp_path, rows, STOPS, "original")
    assert what in fault.what
    assert fault.where == str(path)


def test_an_absent_or_broken_one_is_named(tmp_path: Path) -> None:
    _, (fault,) = tokens.judge(tmp_path, 300, STOPS, "original")
    assert "neither qwen.tiktoken nor tokenizer.json" in fault.what
    vocabulary(tmp_path).write_bytes(b"not base64\n")
    _, (fault,) = tokens.judge(tmp_path, 300, STOPS, "original")
    assert fault.where.endswith("qwen.tiktoken:1")


def test_the_published_file_is_known(tmp_path: Path) -> None:
    shared = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "qwen1" / "tokenizer" / "qwen.tiktoken"
    if not shared.is_file():
        pytest.skip("the published vocabulary file is not ours to commit")
    (tmp_path / tokens.VOCABULARY).write_bytes(shared.read_bytes())
    assert tokens.judge(tmp_path, 152_064, STOPS, "original") == ("<|im_end|>", [])
