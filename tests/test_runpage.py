"""A run's report: made from its folder alone, never in the way of the run, and text in it stays text."""

from __future__ import annotations

import errno
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune import devices, loop, runpage
from finetune.errors import EnvironmentFault
from finetune.runfolder import RunFolder
from finetune.terminal import Terminal
from tests import runs
from tests.payloads import PAYLOADS, WRITABLE
from tests.runs import OUTPUT, finetune, train
from tests.test_run import signal_at

REPORT = OUTPUT / "report.html"
TAGS = {
    "html", "meta", "title", "style", "header", "p", "h1", "h2", "h3", "dl", "div", "dt", "dd", "small", "main",
    "section", "figure", "figcaption", "svg", "line", "text", "polyline", "circle", "rect", "table", "thead",
    "tbody", "tr", "th", "td", "article", "details", "summary", "pre", "span", "ul", "li", "footer",
}  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and text as a browser would take them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.said += data


def test_every_run_leaves_its_report(finished: Path) -> None:
    page = Page(REPORT.read_text())
    assert page.tags <= TAGS
    assert not page.attributes & {"src", "href", "style", "onload", "onerror", "srcset", "action"}
    for words in ("A LoRA adapter of rank", "Result", "Training", "Data", "Plan and measurement", "Identity"):
        assert words in page.said
    identity = json.loads((OUTPUT / "identity.json").read_text())
    for digest in (*identity["base"].values(), *identity["data"].values(), runs.adapter_digest()):
        assert digest in page.said
    answers = [json.loads(line) for line in (OUTPUT / "samples.jsonl").read_text().splitlines()]
    assert all(line["expected"] in page.said for line in answers)
    assert "What is 0 and 2?" in page.said, "the question is asked in words"
    assert "interrupted" not in page.said


def test_it_is_a_function_of_the_folder_alone(finished: Path) -> None:
    before = REPORT.read_bytes()
    REPORT.unlink()
    for name in ("base", "train.jsonl", "eval.jsonl", "r.yaml"):
        path = Path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = finetune("report", str(OUTPUT))
    assert (said.code, said.out, said.err) == (0, f"{REPORT}\n", "")
    assert REPORT.read_bytes() == before
    stamp = REPORT.stat().st_mtime_ns
    assert finetune("report", str(OUTPUT)).code == 0
    assert REPORT.stat().st_mtime_ns == stamp, "the same page is not written again"


def test_a_folder_without_a_run_is_refused(work: Path) -> None:
    for name in ("nowhere", "."):
        said = finetune("report", name)
        assert (said.code, said.err.count("\n")) == (5, 1)
        assert "not a run folder" in said.err
    assert not Path("nowhere").exists()
    assert not Path(".lock").exists()


def test_an_interrupted_run_says_where_it_stands_and_how_it_goes_on(
    work: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signal_at(patch, loop.torch.nn.utils, "clip_grad_norm_", 3)
        assert train().code == 6
    said = Page(REPORT.read_text()).said
    found = re.search(r"This run was interrupted at step 3 of 6\. `finetune (train \S+)` goes on after step 3\.", said)
    assert found is not None
    assert finetune(*found[1].split()).code == 0, "the command that it names goes on"
    assert runs.adapter_digest() == runs.adapter_digest(trained / OUTPUT)
    assert "interrupted" not in Page(REPORT.read_text()).said


def test_while_it_trains_the_report_says_so(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, str] = {}
    real = devices.Session.log

    def log(self: Any, values: Any, step: int) -> None:
        seen[step] = Page(REPORT.read_text()).said if REPORT.exists() else ""
        real(self, values, step)

    monkeypatch.setattr(devices.Session, "log", log)
    assert train().code == 0
    assert [step for step in seen if seen[step]] == [3, 4, 5, 6], "saved every second step"
    assert "under way at step 2 of 6" in seen[3]
    assert "under way at step 4 of 6" in seen[5]
    assert "goes on after step 4" in seen[5]


def test_a_report_that_cannot_be_written_is_said_and_stops_nothing(
    work: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: RunFolder, **how: Any) -> Path:
        raise errors.pop() if errors else RuntimeError("drawn badly\x1b[2J")

    errors: list[Exception] = [EnvironmentFault("cannot write: No space left", str(REPORT)), OSError(errno.EIO, "I/O")]
    monkeypatch.setattr(runpage, "write", refuse)
    said = train()
    assert (said.code, said.err) == (0, "")
    assert said.out.count("report.html was not written: ") == 3
    assert "RuntimeError: drawn badly" in said.out
    assert "\x1b" not in said.out
    assert runs.adapter_digest() == runs.adapter_digest(trained / OUTPUT)
    assert not REPORT.exists()
    monkeypatch.undo()
    assert "this run is finished" in train_in(work).out
    assert REPORT.read_bytes().endswith(b"</html>\n"), "made by the next command"


def train_in(folder: Path) -> runs.Said:
    """``undo`` has put the working folder back too."""
    import os

    os.chdir(folder)
    return train()


def long_run(folder: Path, steps: int) -> RunFolder:
    lines = [
        {"step": step, "loss": 2 + step % 7 / 10 + (30 if step == 7_777 else 0), "learning_rate": 1e-4 * step,
         "grad_norm": 1.0 + step % 3, "tokens": 900, "seconds": 0.5, "tokens_per_second": 1800.0, "memory": 4e9}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"row": f"e:{n}", "expected": "a" * 3000, "before": "b" * 3000, "after": "c" * 3000} for n in range(2000)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"before": {"loss": 3.0, "exact_match": 0.0, "rows": 9}, "after": {"loss": 1.0, "exact_match": 0.5}}
    scores |= {f"step {step}": {"loss": 2.0, "rows": 9} for step in range(100, steps, 100)}
    (folder / "scores.json").write_text(json.dumps(scores))
    return RunFolder(folder)


def test_ten_thousand_steps_stay_small_and_true(finished: Path) -> None:
    folder = long_run(OUTPUT, 10_000)
    runpage.write(folder)
    assert REPORT.stat().st_size < 500_000
    titles = re.findall(r"step 7,\d+ to 7,\d+\ntraining: 2 to 32\n", REPORT.read_text())
    assert len(titles) == 1, "the spike of one step has its place and its number"


def test_a_long_run_writes_its_report_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads all metrics: twenty in all, however often the run saves."""
    written: list[int] = []
    monkeypatch.setattr(runpage, "keep", lambda folder, terminal, training: written.append(1))
    for total, saves, pages_written in ((10_000, 1_000, 19), (10_000, 50, 16), (6, 3, 2), (1, 1, 0)):
        pages = runpage.Pages(RunFolder(tmp_path), Terminal(), total, 0)
        written.clear()
        for step in range(total // saves, total + 1, total // saves):
            pages.at(step)
        assert len(written) == pages_written


def hostile_report() -> Path:
    """Payloads in every place that somebody else could write to."""
    texts = PAYLOADS
    rows = [{"row": text, "expected": text, "before": f"{n}{text}", "after": text} for n, text in enumerate(texts)]
    (OUTPUT / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = json.loads((OUTPUT / "scores.json").read_text())
    scores["after"] |= {"loss_by_source": dict.fromkeys(texts, 1.0)}
    (OUTPUT / "scores.json").write_text(json.dumps(scores | {text: {"loss": 1.0, "exact_match": 1} for text in texts}))
    piece = {"ids": [1], "kind": "trained", "weight": 1}
    spoilt: dict[str, dict[str, Any]] = {
        "plan.json": {
            "notes": texts, "unchecked": texts, "model": texts[0], "device_name": texts[1], "family": texts[2],
            "output": "runs/<img src=x onerror=window.__pwned=1>",
        },
        "identity.json": {key: dict(zip(texts, texts, strict=True)) for key in ("base", "data", "environment")},
        "data.json": {
            "sources": [{"name": text, "samples": 1} for text in texts], "asked": {text: text for text in texts},
            "shown": [{"summary": text, "pieces": [piece | {"text": one} for one in texts]} for text in texts[:4]],
        },
    }  # fmt: skip
    for name, more in spoilt.items():
        (OUTPUT / name).write_text(json.dumps(json.loads((OUTPUT / name).read_text()) | more))
    (OUTPUT / "recipe.yaml").write_text("\n".join(WRITABLE))
    (OUTPUT / "rows.jsonl").write_text("".join(json.dumps({"done": text}) + "\n" for text in texts))
    return runpage.write(RunFolder(OUTPUT))


def test_hostile_text_stays_text(finished: Path) -> None:
    text = hostile_report().read_text()
    page = Page(text)
    assert page.tags <= TAGS
    assert not [name for name in page.attributes if name.startswith("on") or name in ("src", "href", "style", "action")]
    assert page.said.count("window.__pwned=1") > 500
    assert not re.search("[\x1b\x07\u202e]", text)
    assert len(text) < 3_000_000


def test_each_adapter_of_a_run_of_several_has_its_report(work: Path) -> None:
    recipe = Path("r.yaml").read_text()
    Path("r.yaml").write_text(recipe + "adapters:\n  - name: wide\n    adapter:\n      r: 8\n  - name: narrow\n")
    said = train()
    assert said.code == 0, said.err
    for name in ("wide", "narrow"):
        page = Page((OUTPUT / name / "report.html").read_text()).said
        assert f"trained in the same passes as {'narrow' if name == 'wide' else 'wide'}" in page
        assert "interrupted" not in page
        (OUTPUT / name / "report.html").unlink()
    said = finetune("report", str(OUTPUT))
    assert (said.code, said.out) == (0, f"{OUTPUT}/narrow/report.html\n{OUTPUT}/wide/report.html\n")
