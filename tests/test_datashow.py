"""``finetune data show``: what is trained is what is shown, and hostile text stays text."""

from __future__ import annotations

import re
from pathlib import Path

from finetune import datashow, look, prepare
from finetune.plan import course_steps
from tests.payloads import WRITABLE
from tests.runs import chat, finetune, read_rows, write_rows


def test_what_is_shown_as_trained_is_what_is_trained(work: Path) -> None:
    located, renderer = prepare.open_renderer(Path("r.yaml"), ())
    rows = read_rows(Path("train.jsonl"))
    for row in rows[:5]:
        (example,) = renderer.examples(row)
        found = datashow.shown(example, row.conversation.turns, renderer).pieces
        assert [token for piece in found for token in piece.ids] == list(example.ids)
        marks = [piece.kind in ("trained", "end") for piece in found for _ in piece.ids]
        assert marks == list(example.supervised)
        assert found[-1].kind == "end"
        assert found[-1].text == "<|im_end|>"
        answer = "".join(piece.text for piece in found if piece.kind == "trained")
        assert answer == row.conversation.turns[-1].content
        assert {piece.kind for piece in found if piece.text == "<|im_start|>"} == {"frame"}
    assert located.recipe.model == "base"


def test_characters_of_several_tokens_are_whole(work: Path) -> None:
    write_rows(Path("train.jsonl"), [chat("日本 é", "한국 🎉")])
    said = finetune("data", "show", "r.yaml")
    assert said.code == 0, said.err
    assert "⟦한국 🎉<|im_end|>⟧" in said.out
    assert "日本 é" in said.out
    assert "\ufffd" not in said.out
    assert re.search(r"train\.jsonl:1: \d+ tokens, \d+ trained", said.out)


def test_one_row_can_be_asked_for(work: Path) -> None:
    said = finetune("data", "show", "r.yaml", "--row", "3")
    assert "train.jsonl:3:" in said.out
    assert "train.jsonl:2:" not in said.out
    said = finetune("data", "show", "r.yaml", "--row", "900")
    assert (said.code, said.err.count("\n")) == (3, 1)
    assert "there is no row 900, the data has 20" in said.err


def test_text_cannot_steer_the_terminal(work: Path) -> None:
    write_rows(Path("train.jsonl"), [chat(text, "x") for text in WRITABLE if "\x1b" in text or "\u202e" in text])
    out = finetune("data", "show", "r.yaml").out
    assert not re.search("[\x1b\x07\u202e]", out)


def hostile_page(folder: Path) -> Path:
    texts = [text for text in WRITABLE if "\0" not in text and text.strip("\u200b\u200d\ufeff")]  # others are refused
    write_rows(Path("train.jsonl"), [chat(f"{number} {text}", text) for number, text in enumerate(texts)])
    changes = ("train.max_length=2048", "train.micro_batch_tokens=2048")
    shown = look.rows(Path("r.yaml"), changes, None, len(texts))
    (folder / "page.html").write_text(datashow.page("a <b>title</b>", shown))
    return folder / "page.html"


def test_the_page_holds_text_as_text_and_loads_nothing(work: Path) -> None:
    text = hostile_page(work).read_text()
    assert "default-src 'none'" in text
    body = text.partition("</style>")[2]
    tags = set(re.findall(r"<\s*/?\s*([a-zA-Z!][a-zA-Z0-9]*)", body))
    assert tags <= {"h1", "h2", "p", "pre", "span", "html", "head", "header", "main", "section"}
    assert not re.search(r"\s(on\w+|src|href)\s*=", re.sub(r">[^<]*<", "><", body))
    assert "window.__pwned=1" in re.sub("<[^>]*>", "", body)


def test_the_command_writes_the_page(work: Path) -> None:
    said = finetune("data", "show", "r.yaml", "--html", "page.html")
    assert (said.code, said.out.strip()) == (0, "written: page.html")
    assert Path("page.html").read_text().count("<h2>") == 8
    assert finetune("data", "show", "r.yaml", "--html", "page.html").code == 0
    before = Path("train.jsonl").read_bytes()
    assert finetune("data", "show", "r.yaml", "--html", "train.jsonl").code == 5
    assert Path("train.jsonl").read_bytes() == before


def test_a_step_is_shown_as_it_is_packed(work: Path) -> None:
    said = finetune("data", "show", "r.yaml", "--step", "2", "--set", "train.micro_batch_tokens=128")
    assert said.code == 0, said.err
    headings = re.findall(r"── step 2, micro-batch (\d) of (\d): (\d) samples, (\d+) of 128 tokens ──", said.out)
    assert [int(one[0]) for one in headings] == list(range(1, len(headings) + 1))
    assert len(headings) == int(headings[0][1]) > 1
    shown = re.findall(r"(train\.jsonl:\d+): (\d+) tokens", said.out)
    assert sum(int(one[2]) for one in headings) == len(shown) == 4
    assert sum(int(one[3]) for one in headings) == sum(int(tokens) for _, tokens in shown)
    prepared = prepare.prepare(Path("r.yaml"))
    assert prepared.samples is not None
    steps = course_steps(prepared.recipe, prepared.samples.lengths.tolist())
    assert {place for place, _ in shown} == {prepared.samples[index].where for index in steps[1]}
    assert "there is no step 7, the run has 6" in finetune("data", "show", "r.yaml", "--step", "7").err
    assert finetune("data", "show", "r.yaml", "--step", "1", "--row", "1").code == 2


def test_cuts_both_endings_and_weights_are_shown(work: Path) -> None:
    long = chat("one", "two")["messages"] + chat("x" * 300, "three")["messages"]
    half = chat("q", "r")
    half["messages"][1]["weight"] = 0.5
    write_rows(Path("train.jsonl"), [{"messages": long}, half])
    out = finetune("data", "show", "r.yaml", "--set", "data.over_length=split").out
    assert "train.jsonl:1#1" in out
    assert "(split: into 1 samples; 2 turns are left out)" in out
    assert "weights 0.5" in out
    out = finetune("data", "show", "r.yaml", "--set", "data.over_length=drop").out
    assert "(left out: longer than 128 tokens)" in out
    write_rows(Path("train.jsonl"), [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    out = finetune("data", "show", "r.yaml").out
    assert "⟦good<|im_end|>⟧" in out
    assert "⟦bad<|im_end|>⟧" in out
    assert "(rejected)" in out


def test_rows_that_are_held_out_are_said_to_be(work: Path) -> None:
    changes = ("data.eval_path=null", "data.eval_fraction=0.4", "evaluate.metrics=[loss]")
    prepared = prepare.prepare(Path("r.yaml"), changes)
    assert prepared.samples is not None
    trained = {example.where for example in prepared.samples}
    for one in look.rows(Path("r.yaml"), changes, None, 20):
        assert ("held out: not trained" in one.note) == (one.example.where not in trained)
