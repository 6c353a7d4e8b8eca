"""The capability matrix: what stands in docs/ is what a plan knows; nothing is left open; a few are tried again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import capabilities, cells
from finetune import tiny_base
from finetune.recipe import adapter_fields, adapter_methods, adapter_source
from tests.conftest import ROOT

STORED = json.loads((ROOT / "docs" / "capabilities.json").read_text(encoding="utf-8"))
MATRIX: capabilities.Matrix = STORED["methods"]
GREEN = dict.fromkeys(cells.CHECKS, cells.WORKS)


def test_every_cell_has_a_verdict() -> None:
    assert list(MATRIX) == [row.name for row in cells.rows()]
    for name, bases in MATRIX.items():
        assert tuple(bases) == adapter_methods.TRIED
        for base, cell in bases.items():
            assert tuple(cell) == cells.CHECKS
            for check, verdict in cell.items():
                kind, _, reason = verdict.partition(": ")
                assert verdict == cells.WORKS or (kind in ("refused", "fails") and len(reason) > 5), (name, base, check)


def test_every_method_of_the_installed_peft_has_a_row() -> None:
    assert STORED["versions"]["peft"] == adapter_source.version()
    assert set(adapter_source.methods()) <= set(MATRIX)


def test_what_was_promised_is_green() -> None:
    usual = ("lora", "lora use_rslora: true", "lora use_dora: true", "lora init_lora_weights: pissa")
    usual += ("lora init_lora_weights: olora", "lora init_lora_weights: eva")
    for name in usual:
        assert MATRIX[name] == dict.fromkeys(adapter_methods.TRIED, GREEN), name
    whole = [name for name in MATRIX if MATRIX[name]["bf16"] == GREEN and MATRIX[name]["nf4"] == GREEN]
    assert len(whole) >= 30


def test_a_plan_knows_what_the_matrix_says() -> None:
    """Three files, one content."""
    assert adapter_methods.tried() == capabilities.table(MATRIX, STORED["versions"]["peft"])
    assert (ROOT / "docs" / "capabilities.md").read_text(encoding="utf-8") == capabilities.page(MATRIX, STORED)


@pytest.mark.parametrize("row", cells.rows(), ids=lambda row: row.name)
def test_a_recipe_is_refused_exactly_where_the_matrix_says_so(row: cells.Row) -> None:
    fields, findings = adapter_fields.check({"method": row.method, **row.fields})
    for base, cell in MATRIX[row.name].items():
        bad = next((cell[check] for check in ("train", "resume", "export") if cell[check] != cells.WORKS), "")
        found = [reason for _, reason in adapter_methods.refusals(row.method, fields, base)]
        if not bad:
            assert (findings, found) == ([], [])
        elif findings:
            assert bad.startswith("refused: "), bad
        elif bad.startswith("fails"):
            assert found == [f"{row.name} on {base}: {bad.partition(': ')[2]}"]


TRIED_AGAIN = [
    ("loha", "nf4"),
    ("lora init_lora_weights: olora", "int8"),
    ("oft", "bf16"),
    ("glora", "fp4"),
    ("xlora", "fp32"),
]


@pytest.mark.parametrize(("name", "base"), TRIED_AGAIN)
def test_a_cell_is_as_it_stands(name: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempted(name, base, tmp_path, monkeypatch) == MATRIX[name][base]


@pytest.mark.long
def test_every_cell_is_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MATRIX:
        for base in adapter_methods.TRIED:
            assert attempted(name, base, tmp_path, monkeypatch) == MATRIX[name][base], (name, base)


def attempted(name: str, base: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The cell tried anew, whatever the table says of it."""
    nothing: dict[str, Any] = {"peft": adapter_source.version(), "refused": {}, "unmerged": {}}
    monkeypatch.setattr(adapter_methods, "tried", lambda: nothing)
    dtype = "bfloat16" if base == "bf16" else "float32"
    if not (folder / dtype).is_dir():
        tiny_base.build(folder / dtype, dtype=dtype)
    row = next(row for row in cells.rows() if row.name == name)
    return cells.attempt(row, base, folder / dtype, folder / "cell")


def test_a_method_that_computes_something_else_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a base that shows its packed codes in place of its weights, as PEFT finds it by itself."""
    from finetune.kernels import frozen_linear

    monkeypatch.setattr(frozen_linear, "show", lambda model: None)
    found = attempted("hra", "int8", tmp_path, monkeypatch)
    assert found["export"].startswith("fails: plain PEFT is ")
    assert found["merge"].startswith("fails: the merged model differs")
