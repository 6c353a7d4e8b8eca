"""Samples on disk: the same as rendered, kept by content, made anew for a changed byte, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune import dataset, gather, manifest, prepare, store
from finetune.dataset import Reader, Row, Source
from finetune.errors import DataError, EnvironmentFault
from finetune.renderer import Renderer
from finetune.samples import Samples
from finetune.window import Window
from tests.runs import ROOT, chat, read_rows, write_rows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def renderer(work: Path) -> Renderer:
    return prepare.open_renderer(Path("r.yaml"), ())[1]


def reader(renderer: Renderer, path: str = "train.jsonl", **more: Any) -> Reader:
    return Reader(Source(path=path, **more), gather.special_tokens(renderer))


def test_what_is_stored_is_what_was_rendered(renderer: Renderer) -> None:
    weighted = chat("a", "b", system="s")
    weighted["messages"][-1]["weight"] = 0.3
    write_rows(Path("train.jsonl"), [chat("日本 é", "🎉\n"), weighted, {"messages": 2 * chat("q", "r")["messages"]}])
    window = Window(renderer=renderer, max_length=128)
    found = store.open_source(reader(renderer), window)
    rendered = [example for row in read_rows(Path("train.jsonl")) for example in renderer.examples(row)]
    stored = [found.example(index) for index in range(len(rendered))]
    assert [(one.ids, one.weights, one.where) for one in stored] == [
        (one.ids, one.weights, one.where) for one in rendered
    ]
    assert 0.3 in stored[1].weights
    assert found.lengths.tolist() == [len(one.ids) for one in rendered]
    assert found.columns["supervised"].tolist() == [sum(one.supervised) for one in rendered]
    assert found.mapping == "chat: 'messages' → turns"


def test_samples_of_several_stores_are_one_sequence(renderer: Renderer) -> None:
    write_rows(Path("more.jsonl"), [chat(f"{n}", "x") for n in range(5)])
    window = Window(renderer=renderer, max_length=128)
    one, two = (store.open_source(reader(renderer, path), window) for path in ("train.jsonl", "more.jsonl"))
    samples = Samples([(one, np.array([0, 7, 19])), (two, np.array([4, 1]))])
    places = ["train.jsonl:1", "train.jsonl:8", "train.jsonl:20", "more.jsonl:5", "more.jsonl:2"]
    assert [example.where for example in samples] == places
    assert len(samples) == 5
    assert samples[-1].where == places[-1]
    assert [example.where for example in samples[1:4]] == places[1:4]
    assert samples.lengths.tolist() == [len(example.ids) for example in samples]
    with pytest.raises(IndexError):
        samples[5]


def test_an_unchanged_second_opening_reads_no_row(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    window = Window(renderer=renderer, max_length=128)
    first = store.open_source(reader(renderer), window)

    def forbidden(*_: object) -> None:
        raise AssertionError("a row was rendered again")

    monkeypatch.setattr(Window, "place", forbidden)
    assert store.open_source(reader(renderer), window).folder == first.folder


def _changes() -> dict[str, Any]:
    """What must make another store: a change of the data, how it is read, the tokenizer, its template, the window."""

    def one_byte(renderer: Renderer) -> dict[str, Any]:
        data = bytearray(Path("train.jsonl").read_bytes())
        data[data.index(b"What") + 1] ^= 1
        Path("train.jsonl").write_bytes(data)
        return {}

    def template(renderer: Renderer) -> dict[str, Any]:
        renderer.tokenizer.chat_template = str(renderer.tokenizer.chat_template) + "{# #}"
        return {}

    def token(renderer: Renderer) -> dict[str, Any]:
        renderer.tokenizer.add_tokens(["What is"])
        return {}

    def attribute(name: str, value: object) -> Any:
        def change(renderer: Renderer) -> dict[str, Any]:
            setattr(renderer, name, value)
            return {}

        return change

    return {
        "one byte": one_byte, "template": template, "tokenizer": token, "train_on": attribute("train_on", "all"),
        "thinking": attribute("thinking", "strip"), "literals": attribute("literals", ("<|im_end|>",)),
        "piecewise": attribute("piecewise", True), "window": lambda _: {"max_length": 127},
        "policy": lambda _: {"policy": "drop"}, "format": lambda _: {"format": "chat"},
    }  # fmt: skip


@pytest.mark.parametrize("change", _changes().values(), ids=_changes())
def test_a_change_makes_another_store(change: Any, renderer: Renderer) -> None:
    before = store.key(reader(renderer), Window(renderer=renderer, max_length=128))
    assert store.key(reader(renderer), Window(renderer=renderer, max_length=128)) == before
    more = change(renderer)
    source = {"format": more.pop("format")} if "format" in more else {}
    assert store.key(reader(renderer, **source), Window(renderer=renderer, **({"max_length": 128} | more))) != before


def test_the_code_that_makes_samples_is_part_of_the_key(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    window = Window(renderer=renderer, max_length=128)
    before = store.key(reader(renderer), window)
    digest = manifest.digest
    monkeypatch.setattr(manifest, "digest", lambda path: digest(path) + ("x" if path.name == "renderer.py" else ""))
    assert store.key(reader(renderer), window) != before


def test_a_damaged_store_is_made_again(renderer: Renderer) -> None:
    window = Window(renderer=renderer, max_length=128)
    found = store.open_source(reader(renderer), window)
    right = found.example(3)
    with (found.folder / "ids").open("r+b") as file:
        file.seek(12)
        file.write(b"\xff")
    assert store.open_source(reader(renderer), window).example(3) == right
    assert not manifest.faults(found.folder)


def test_faulty_rows_leave_no_store(renderer: Renderer) -> None:
    rows = [chat("a", "b"), chat("a", " "), chat("x" * 900, "b")]
    write_rows(Path("train.jsonl"), [*rows, *rows])
    with pytest.raises(DataError) as caught:
        store.open_source(reader(renderer), Window(renderer=renderer, max_length=128))
    assert [fault.where.rpartition(":")[2] for fault in caught.value.faults] == ["2", "3", "5", "6"]
    assert not [path for path in store.cache_folder().iterdir() if path.is_dir()]


def test_ranked_rows_are_refused_by_name(renderer: Renderer) -> None:
    write_rows(Path("train.jsonl"), [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match="this row ranks two answers"):
        store.open_source(reader(renderer), Window(renderer=renderer, max_length=128))


def test_a_cache_that_cannot_be_written_is_one_message(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("file").absolute()))
    with pytest.raises(EnvironmentFault, match="XDG_CACHE_HOME"):
        store.open_source(reader(renderer), Window(renderer=renderer, max_length=128))


KILLED = """
import os, signal, sys
from pathlib import Path
from finetune import gather, prepare, store
from finetune.dataset import Reader, Source
from finetune.window import Window
renderer = prepare.open_renderer(Path("r.yaml"), ())[1]
at, calls = int(sys.argv[1]), 0
def strike(event, args):
    global calls
    if event in ("open", "os.rename", "os.mkdir", "os.remove") and "finetune/rows" in str(args[0]):
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(strike)
store.open_source(Reader(Source(path="train.jsonl"), gather.special_tokens(renderer)),
                  Window(renderer=renderer, max_length=128))
"""


@pytest.mark.parametrize("at", [1, 3, 6, 11, 16, 24, 30, 10_000])
def test_a_killed_writer_leaves_nothing_that_loads(at: int, renderer: Renderer) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(at)], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == (0 if at == 10_000 else -signal.SIGKILL)
    if store.cache_folder().is_dir():
        for folder in store.cache_folder().iterdir():
            assert ".tmp-" in folder.name or not folder.is_dir() or not manifest.faults(folder)
    window = Window(renderer=renderer, max_length=128)
    found = store.open_source(reader(renderer), window)
    assert len(found.lengths) == 20
    assert not [path for path in store.cache_folder().iterdir() if ".tmp-" in path.name]


def test_only_the_stores_used_last_stay(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_KEPT", 3)
    window = Window(renderer=renderer, max_length=128)
    folders = []
    for number in range(5):
        write_rows(Path(f"{number}.jsonl"), [chat("a", "b")])
        folders.append(store.open_source(reader(renderer, f"{number}.jsonl"), window).folder)
        os.utime(folders[-1], (number, number))
    assert [path for path in folders if path.is_dir()] == folders[2:]


def test_a_file_is_never_held_in_memory(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go to the disk one by one: of 400 rows never more than a few are alive."""
    alive = most = 0

    class Counted(Row):
        def __init__(self, **fields: Any) -> None:
            nonlocal alive, most
            super().__init__(**fields)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    write_rows(Path("train.jsonl"), [chat(f"{n}", "b") for n in range(400)])
    monkeypatch.setattr(store, "Row", Counted)
    assert len(store.open_source(reader(renderer), Window(renderer=renderer, max_length=128)).lengths) == 400
    assert 0 < most < 10


def test_named_rows_come_back(renderer: Renderer) -> None:
    write_rows(Path("train.jsonl"), [chat("a", "b"), chat("x" * 900, "b"), chat("a", "\nb")])
    window = Window(renderer=renderer, max_length=128, policy="drop")
    for _ in range(2):
        found = store.open_source(reader(renderer), window)
        assert [(one.where, one.done) for one in found.named()] == [
            ("train.jsonl:2", "left out"), ("train.jsonl:3", "tokenised in pieces"),
        ]  # fmt: skip
        assert found.meta["rows"] == 3
    assert json.loads((found.folder / "meta.json").read_text())["tokens"] == found.lengths.sum()


def test_folded_digests_are_those_of_the_rows(renderer: Renderer) -> None:
    rows = [dataset.folded(row.conversation) for row in read_rows(Path("train.jsonl"))]
    found = store.open_source(reader(renderer), Window(renderer=renderer, max_length=128))
    assert found.columns["folded"].tobytes() == b"".join(rows)
