"""A grid's combinations, their names, and every fault of all of them at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import grid, recipe
from finetune.errors import RecipeError
from tests.recipe.text import BASE


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text(f'{{"{name}": 1}}\n')
    Path("r.yaml").write_text(BASE)
    return tmp_path


def made(*words: str, overrides: tuple[str, ...] = ()) -> list[grid.Combination]:
    return grid.combinations(Path("r.yaml"), words, overrides)[1]


def refused(*words: str, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        made(*words, overrides=overrides)
    return [str(fault) for fault in caught.value.faults]


def test_every_combination_in_the_grids_order() -> None:
    root, found = grid.combinations(
        Path("r.yaml"), ["adapter.r=8,16", "train.learning_rate=1e-4,2e-4"], ["output=runs/ab"]
    )
    assert root == Path("runs/ab")
    assert [one.name for one in found] == [
        "r=8,learning_rate=1e-4", "r=8,learning_rate=2e-4", "r=16,learning_rate=1e-4", "r=16,learning_rate=2e-4",
    ]  # fmt: skip
    read = [recipe.load(Path("r.yaml"), one.overrides) for one in found]
    assert [(one.adapter.fields["r"], one.train.learning_rate) for one in read] == [
        (8, 1e-4), (8, 2e-4), (16, 1e-4), (16, 2e-4),
    ]  # fmt: skip
    assert [Path(one.output) for one in read] == [one.output for one in found] == [root / one.name for one in found]


def test_commas_inside_brackets_and_quotes_belong_to_the_value() -> None:
    assert grid.split('[a, b],c,"d,e",{f: 1, g: [2]}') == ["[a, b]", "c", '"d,e"', "{f: 1, g: [2]}"]
    found = made("adapter.target_modules=[q_proj,v_proj],all-linear")
    assert [one.name for one in found] == ["target_modules=q_proj-v_proj", "target_modules=all-linear"]


def test_names_are_told_apart_and_short() -> None:
    found = made("adapter.target_modules=[q_proj],[q_proj ]")
    assert len({one.name for one in found}) == 2
    assert all(one.name.startswith("target_modules=q_proj_") for one in found)
    found = made("adapter.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj],all-linear",
                 f"train.learning_rate=0.001{'0' * 17}1,0.001{'0' * 17}2")  # fmt: skip
    assert len({one.name for one in found}) == 4
    assert max(len(one.name) for one in found) == 96


def test_no_value_leads_out_of_the_sweeps_folder() -> None:
    assert grid._plain("-1") != grid._plain("1")
    for value in ("../../x", "..", "/etc", "-1", "a\x1b[2J", "\u202e"):
        name = grid._plain(value)
        assert name.isascii()
        assert "/" not in name
        assert name.isprintable()


def test_all_faults_of_all_combinations_come_together() -> None:
    faults = refused("adapter.r=8,many", "train.learning_rate=1e-4,-1", overrides=("train.stps=3",))
    assert len(faults) == 3
    assert sum("train.stps" in fault and "(in" not in fault for fault in faults) == 1
    assert any("adapter.r" in fault and "(in r=many,learning_rate=1e-4 and 1 more)" in fault for fault in faults)
    assert any("learning_rate" in fault and "learning_rate=-1" in fault for fault in faults)


@pytest.mark.parametrize(
    ("words", "overrides", "said"),
    [
        (["adapter.r"], (), "must look like section.key=value,value"),
        (["adapter.r="], (), "must look like"),
        (["adapter.r=8,"], (), "must look like"),
        (["=8"], (), "must look like"),
        (["output=a,b"], (), "cannot be swept"),
        (["adapters=a,b"], (), "cannot be swept"),
        (["adapter.r=8", "adapter.r=16"], (), "is given twice"),
        (["adapter.r=8,16"], ("adapter.r=4",), "is given twice"),
        (["adapter.r=8,16,8"], (), "has the value 8 twice"),
        (["train.seed=" + ",".join(map(str, range(20))), "adapter.r=" + ",".join(map(str, range(1, 15)))], (), "280"),
        (["train.lerning_rate=1,2"], (), "did you mean 'learning_rate'?"),
    ],
)
def test_a_faulty_grid_is_told(words: list[str], overrides: tuple[str, ...], said: str) -> None:
    faults = refused(*words, overrides=overrides)
    assert said in faults[0]
    assert len(faults) == 1
