"""The vocabulary file's conversion: the same ids and the same text as encoding by ranks, the original's chat frame.

All of it runs on a vocabulary trained here; where the published file is at hand, on that one too.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import unicodedata
from base64 import b64encode
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import regex
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune import tiktoken_file

SHARED = Path(__file__).resolve().parents[2] / "shared" / "vectors" / "qwen1" / "tokenizer"
# Written out once more, so that a slip in the module's own constants shows.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *[f"<|extra_{index}|>" for index in range(205)]]
TEXT = (
    "the date is of user assistant system don't WE'LL 'LLAMA 'rest l'été naïve Ångström über 2019 15.02 007 12345 3.14 "
    "日本語 漢字かな交じり 你好，世界 한국어 русский здравствуйте עברית العربية สวัสดี हिन्दी नमस्ते tiếng Việt ﬁ Ⅷ ４２ ½ "
    'print( return x[3:10]!=z&&f(`a`) {"k":1.5e-3} http://a.b/c?d=e ---- // == **kwargs …–“” '
    "👨\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽 🇩🇪 𝒳 𠀋"
)
WORDS = TEXT.split()
GAPS = [
    " ",
    " ",
    " ",
    "",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n",
    "\n  ",
    "\u00a0",
    "\u3000",
    "\u2003",
    "\x0b\x0c",
    "\x85",
]
ODD = [
    *SPECIALS[:4], "<|extra_204|>", "<|extra_205|>", "<|im_start", "|>", "<|im_start|", "<|IM_END|>", "e\u0301",
    "A\u030a", "\u1112\u1161\u11ab", "\u0344", "\u212b", "\u0958", "\ufb2a", "q\u0323\u0307", "'\u017f", "'S",
    "'\u212a", "'LL", "\u200b", "\ufeff", "\u200d", "\x00", "\x7f", "\U0010ffff", "\ue000", "\uffff", "\U000e0041",
]  # fmt: skip


class Made(NamedTuple):
    """A vocabulary file, its ranks, and a folder with the tokenizer made from it."""

    file: Path
    ranks: dict[bytes, int]
    folder: Path

    def load(self) -> Any:
        return loaded(self.folder)


@cache
def loaded(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def convert(file: Path, folder: Path, rows: int, *, chat: bool = True) -> Path:
    folder.mkdir()
    tiktoken_file.write(folder, file, vocab_rows=rows, max_length=2048, chat=chat)
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def store(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(b"%s %d\n" % (b64encode(token), rank) for token, rank in ranks.items()))
    return path


def letters() -> dict[str, int]:
    """Letter → byte of the byte-level alphabet, asked from the library."""
    text = "".join(map(chr, range(0x100))) + "".join(chr(0x100 << shift) for shift in range(13))
    text += "".join(chr(lead << 6) for lead in range(4, 32)) + "".join(chr(0x1000 * lead) for lead in range(1, 13))
    text += "\ue000\uf000\U00010000\U00040000\U00080000\U000c0000\U00100000"
    ((shown, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    known = dict(zip(shown, text.encode(), strict=True))
    absent = set(range(256)) - set(
        known.values()
    )  # UTF-8 has no such bytes; as the rest of Latin-1 they are themselves
    return known | {chr(byte): byte for byte in absent}


@pytest.fixture(scope="module")
def trained() -> tuple[dict[bytes, int], list[tuple[bytes, bytes]]]:
    """A vocabulary and its merges, learnt by the library from made-up text."""
    source = random.Random(0)
    words = [word[: source.randint(1, len(word))] + source.choice(WORDS) for word in WORDS for _ in range(20)]
    text = ["".join(source.choice(WORDS + words) + source.choice(GAPS) for _ in range(40)) for _ in range(400)]
    tokenizer = Tokenizer(models.BPE())
    # Coarser than the pattern: digits, quotes and blanks are merged too, so that a lost split shows in the ids.
    split = pre_tokenizers.Split(Regex(r"\s*\S+|\s+"), behavior="isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2500, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    tokenizer.train_from_iterator(text, trainer)
    model, table = json.loads(tokenizer.to_str())["model"], letters()
    ranks = {bytes(table[letter] for letter in token): rank for token, rank in model["vocab"].items()}
    merges = [[bytes(table[letter] for letter in half) for half in pair] for pair in model["merges"]]
    return ranks, [(left, right) for left, right in merges]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, trained: tuple[dict[bytes, int], Any]) -> Made:
    folder = tmp_path_factory.mktemp("trained")
    file = store(folder / "qwen.tiktoken", trained[0])
    return Made(file, trained[0], convert(file, folder / "native", len(trained[0]) + 256))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Made:
    file = SHARED / "qwen.tiktoken"
    if not file.is_file():
        pytest.skip("the published vocabulary file is not at hand")
    folder = tmp_path_factory.mktemp("published") / "native"
    return Made(file, tiktoken_file.read_ranks(file), convert(file, folder, 152_064))


@pytest.fixture(params=["small", "published"])
def made(request: pytest.FixtureRequest) -> Made:
    found: Made = request.getfixturevalue(request.param)
    return found


def replay(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Byte-pair encoding with the ranks below ``limit``: the lowest first, of equals the leftmost."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 1:
        pairs = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= limit:
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def expected(text: str, ranks: dict[bytes, int], *, special: bool = True) -> list[int]:
    """What the original's encoding by ranks gives."""
    text = unicodedata.normalize("NFC", text)
    ids = []
    for piece in regex.split("(" + "|".join(map(regex.escape, SPECIALS)) + ")", text) if special else [text]:
        if special and piece in SPECIALS:
            ids.append(len(ranks) + SPECIALS.index(piece))
        else:
            parts = (part for word in regex.findall(PATTERN, piece) for part in replay(word.encode(), ranks, 10**9))
            ids += [ranks[part] for part in parts]
    return ids


def texts(count: int) -> Iterator[str]:
    source = random.Random(1)
    planes = [(0, 0x80), (0x80, 0x800), (0x300, 0x370), (0x800, 0xD800), (0xE000, 0x10000), (0x1F300, 0x1FB00)]
    planes += [(0x10000 * plane, 0x10000 * (plane + 1)) for plane in range(1, 17)]
    for _ in range(count):
        yield "".join(source.choice(WORDS) + source.choice(GAPS) for _ in range(12))
        yield "".join(source.choice([source.choice(WORDS), source.choice(ODD), source.choice(GAPS)]) for _ in range(12))
        yield "".join(chr(source.randrange(*source.choice(planes))) for _ in range(20))
        yield source.randbytes(20).decode("utf-8", "replace")
        yield "".join(source.choice(" \t\n\r\u00a0\u2003\u3000\x0b\x0c\x85a1.\u0301") for _ in range(16))
        yield "".join(
            source.choice("aA0\u0300\u0301\u0323\u0327\u0338\u05b7\u0345\u1161\u1100\u11a8가=") for _ in range(12)
        )


def test_ids_are_those_of_encoding_by_ranks(made: Made) -> None:
    tokenizer = made.load()
    generic = PreTrainedTokenizerFast.from_pretrained(made.folder)
    for text in texts(300):
        ids = expected(text, made.ranks)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, ascii(text)
        assert generic.encode(text, add_special_tokens=False) == ids, ascii(text)
        assert tokenizer.decode(ids) == generic.decode(ids) == unicodedata.normalize("NFC", text)


def test_any_ids_decode_as_their_bytes(made: Made) -> None:
    tokenizer, source = made.load(), random.Random(2)
    names = [*sorted(made.ranks, key=made.ranks.__getitem__), *(token.encode() for token in SPECIALS)]
    for _ in range(1000):
        ids = [source.randrange(source.choice([256, len(names)])) for _ in range(12)]
        assert tokenizer.decode(ids) == b"".join(names[index] for index in ids).decode("utf-8", "replace")
    plain = tokenizer.decode([*ids, *range(len(made.ranks), len(names))], skip_special_tokens=True)
    kept = b"".join(names[index] for index in ids if index < len(made.ranks))
    assert plain == kept.decode("utf-8", "replace")


def test_the_original_gives_the_same_ids(made: Made) -> None:
    """Against the library that the original's own code calls; no dependency of ours."""
    tiktoken = pytest.importorskip("tiktoken")
    first = len(made.ranks)
    specials = {token: first + index for index, token in enumerate(SPECIALS)}
    original = tiktoken.Encoding("Qwen", pat_str=PATTERN, mergeable_ranks=made.ranks, special_tokens=specials)
    for text in texts(1000):
        ids = original.encode(unicodedata.normalize("NFC", text), allowed_special="all")
        assert made.load().encode(text) == ids, ascii(text)
        assert made.load().decode(ids) == original.decode(ids)


def test_published_strings(published: Made) -> None:
    """Strings with the ids that the original gives them."""
    tokenizer, differences = published.load(), []
    lines = (SHARED / "expected.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        row = json.loads(line)
        if tokenizer.encode(row["text"]) != row["ids"]:
            differences.append(row["text"])
        if tokenizer.decode(row["ids"]) != unicodedata.normalize("NFC", row["text"]):
            differences.append(row["text"])
    assert (len(lines), differences) == (600, [])


def test_the_published_file_is_known(published: Made, small: Made) -> None:
    assert tiktoken_file.is_published(published.file)
    assert not tiktoken_file.is_published(small.file)
    assert (len(published.ranks), len(published.load())) == (151_643, 151_851)
    ids = published.load()("<|im_start|>system\n<|im_start|>user\n<|im_start|>assistant\n")["input_ids"]
    assert ids == [151644, 8948, 198, 151644, 872, 198, 151644, 77091, 198]


def test_merges_are_those_that_were_learnt(trained: tuple[dict[bytes, int], Any]) -> None:
    assert tiktoken_file.merges(trained[0]) == trained[1]


def test_the_alphabet_is_the_librarys() -> None:
    assert {chr(letter): byte for byte, letter in tiktoken_file._letters().items()} == letters()


def test_special_tokens_follow_the_ranks(made: Made) -> None:
    tokenizer, first = made.load(), len(made.ranks)
    assert [tokenizer.encode(token) for token in SPECIALS] == [[first + index] for index in range(208)]
    assert tokenizer.convert_ids_to_tokens(list(range(first, first + 208))) == SPECIALS
    assert len(tokenizer) == first + 208
    assert list(tiktoken_file.SPECIALS) == SPECIALS


def test_special_tokens_in_a_content_are_text(made: Made) -> None:
    tokenizer = made.load()
    for text in [*SPECIALS, *(text for text in texts(60) if "<|" in text)]:
        ids = tokenizer.encode(text, split_special_tokens=True)
        assert ids == expected(text, made.ranks, special=False)
        assert max(ids) < len(made.ranks)
    if tiktoken_file.is_published(made.file):
        ids = tokenizer.encode('print("<|endoftext|>")', split_special_tokens=True)
        assert ids == [1350, 9639, 91, 8691, 723, 427, 91, 82598]


def test_a_stroke_after_a_special_token_is_the_one_difference(small: Made) -> None:
    """U+0338 composes with ">": the original normalises first and then sees no special token. Here the token is found
    first, as in every later Qwen."""
    first = len(small.ranks)
    for tokenizer in (small.load(), PreTrainedTokenizerFast.from_pretrained(small.folder)):
        assert tokenizer.encode("<|im_end|>\u0338") == [first + 2, *expected("\u0338", small.ranks)]
    assert max(expected("<|im_end|>\u0338", small.ranks)) < first


def test_the_same_file_gives_the_same_bytes_and_the_librarys_own(tmp_path: Path, small: Made) -> None:
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"}
    shuffled = list(small.ranks.items())
    random.Random(3).shuffle(shuffled)
    again = convert(store(tmp_path / "qwen.tiktoken", dict(shuffled)), tmp_path / "again", len(small.ranks) + 256)
    assert {path.name for path in again.iterdir()} == names
    assert all((again / name).read_bytes() == (small.folder / name).read_bytes() for name in names)
    written = (again / "tokenizer.json").read_text(encoding="utf-8")
    assert Tokenizer.from_str(written).to_str() == written


def test_neither_torch_nor_the_originals_library_is_imported() -> None:
    code = (
        "import sys, finetune.tiktoken_file; sys.exit(bool({'torch', 'tiktoken', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
