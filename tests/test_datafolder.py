"""A folder that holds a data set: which of its files are a split, and what is refused."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pytest

from finetune import datafolder, records
from finetune.errors import DataError

ROW = b'{"text": "a"}\n'


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ROW)
    return folder


def chosen(folder: Path, split: str, subset: str | None = None) -> list[str]:
    return [str(path.relative_to(folder)) for path in datafolder.files(folder, split, subset)]


def refused(folder: Path, split: str = "train", subset: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        datafolder.files(folder, split, subset)
    (fault,) = caught.value.faults
    assert fault.fix
    assert str(folder) in fault.where
    return str(caught.value)


# --- files by their names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl", "README.md", "LICENSE"], "train", ["train.jsonl"]),
        (["train.jsonl", "dev.jsonl"], "validation", ["dev.jsonl"]),
        (["my_train_set.csv", "my_eval_set.csv"], "test", ["my_eval_set.csv"]),
        (["b.jsonl", "a.jsonl", "notes.txt", "a.py"], "train", ["a.jsonl", "b.jsonl"]),
        (["train/b.jsonl", "train/a.jsonl", "test/c.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
        (["train/train.jsonl", "train/train-2.jsonl"], "train", ["train/train-2.jsonl", "train/train.jsonl"]),
        (
            ["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet"], "train",
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        (["data/train_sft-00000-of-00001.parquet"], "train_sft", ["data/train_sft-00000-of-00001.parquet"]),
        (["train.jsonl.gz", "test.jsonl.gz"], "train", ["train.jsonl.gz"]),
        (["train.JSONL", ".hidden/train.jsonl", ".train.jsonl", "__pycache__/train.json"], "train", ["train.JSONL"]),
        (["a.jsonl", "config.json", "dataset_info.json"], "train", ["a.jsonl"]),
        (["a.jsonl", "test_notes.txt"], "train", ["a.jsonl"]),
    ],
)  # fmt: skip
def test_files_of_a_split(tmp_path: Path, names: list[str], split: str, expected: list[str]) -> None:
    assert chosen(fill(tmp_path / "rows [1]", *names), split) == expected


def test_the_choice_is_the_one_that_datasets_makes(tmp_path: Path) -> None:
    rng = random.Random(7)
    words = ["train", "test", "dev", "val", "evaluation", "a", "b2", "training", "part", "x_train_y", "contest"]
    for number in range(60):
        names = []
        for _ in range(rng.randint(1, 6)):
            parts = [rng.choice(words) for _ in range(rng.randint(0, 2))]
            names.append("/".join([*parts, f"{rng.choice(words)}{rng.choice(['', '-1', '_2', '.old'])}.jsonl"]))
        folder = fill(tmp_path / str(number), *names)
        theirs = datasets.load_dataset_builder(str(folder)).config.data_files
        for split, paths in theirs.items():
            assert set(chosen(folder, str(split))) == {str(Path(path).relative_to(folder)) for path in paths}, names


def test_every_kind_of_file_is_one_that_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "train").mkdir(parents=True)
    for name in ("a.jsonl", "b.json", "c.jsonl.gz"):
        (folder / "train" / name).write_bytes(gzip.compress(ROW) if name.endswith("gz") else ROW)
    read = [record.value for path in datafolder.files(folder, "train") for record in records.read(path)]
    assert read == [{"text": "a"}] * 3


def test_splits_that_are_there_are_named(tmp_path: Path) -> None:
    said = refused(fill(tmp_path, "train.jsonl", "test.jsonl"), "validation")
    assert "no split validation" in said
    assert "train, test" in said


def test_no_data_file(tmp_path: Path) -> None:
    assert "no data file" in refused(fill(tmp_path, "README.md.txt", "LICENSE", "train.py", "train.txt"))
    assert "No such file" in refused(tmp_path / "absent")


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "train.jsonl.gz"], ["train.json", "train.jsonl"], ["train.csv", "train.parquet"],
        ["train/a.jsonl", "train/b.csv"],
    ],
)  # fmt: skip
def test_what_may_be_the_same_rows_twice_is_not_guessed_at(tmp_path: Path, names: list[str]) -> None:
    said = refused(fill(tmp_path, *names))
    assert "may be the same rows in two forms" in said
    assert all(name in said for name in names)


def test_nothing_in_the_folder_is_run_or_written(tmp_path: Path) -> None:
    folder = fill(tmp_path / "rows", "train.jsonl")
    for name in ("rows.py", "__init__.py", "loader.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    before = sorted(tmp_path.rglob("*"))
    assert chosen(folder, "train") == ["train.jsonl"]
    assert sorted(tmp_path.rglob("*")) == before


# --- files by the README ----------------------------------------------------------------------------------------------


def described(folder: Path, configs: Any) -> Path:
    (folder / "README.md").write_text(f"---\nlicense: mit\n{json.dumps({'configs': configs})[1:-1]}\n---\n# Rows\n")
    return folder


def test_the_readme_says_which_files(tmp_path: Path) -> None:
    folder = fill(tmp_path, "train.jsonl", "one/a.jsonl", "one/b.jsonl", "two/a.jsonl", "two/test.jsonl")
    splits = [{"split": "train", "path": "one/*.jsonl"}, {"split": "extra", "path": ["./two/a.jsonl"]}]
    described(folder, [{"config_name": "main", "data_files": splits}, {"config_name": "two", "data_dir": "two"}])
    assert chosen(folder, "train", "main") == ["one/a.jsonl", "one/b.jsonl"]
    assert chosen(folder, "extra", "main") == ["two/a.jsonl"]
    assert chosen(folder, "test", "two") == ["two/test.jsonl"]
    assert "several subsets" in refused(folder)
    said = refused(folder, subset="three")
    assert "no subset three" in said
    assert "main, two" in said


def test_the_default_subset(tmp_path: Path) -> None:
    folder = fill(tmp_path, "a.jsonl", "b.jsonl")
    two = [
        {"config_name": "a", "data_files": "a.jsonl"},
        {"config_name": "b", "data_files": "b.jsonl", "default": True},
    ]
    assert chosen(described(folder, two), "train") == ["b.jsonl"]
    assert chosen(described(folder, two[:1]), "train") == ["a.jsonl"]
    (folder / "README.md").write_text("# Rows, and no head\n")
    assert "no subset a" in refused(folder, subset="a")


@pytest.mark.parametrize(
    "path", ["../secret.jsonl", "../**", "/etc/*.json", "http://127.0.0.1:1/a.jsonl", "one/../../*"]
)
def test_a_readme_leads_nowhere_else(tmp_path: Path, path: str) -> None:
    fill(tmp_path, "secret.jsonl")
    folder = fill(tmp_path / "rows", "a.jsonl", "one/b.jsonl")
    described(folder, [{"config_name": "default", "data_files": path}])
    assert "no data file" in refused(folder)
    described(folder, [{"config_name": "default", "data_dir": ".."}])
    assert "no data file" in refused(folder)


@pytest.mark.parametrize(
    "head", ["configs: [", "configs: 7", "configs:\n- data_files: a", "configs:\n- config_name: a\n  data_files: 7"]
)
def test_a_readme_that_cannot_be_read(tmp_path: Path, head: str) -> None:
    folder = fill(tmp_path, "train.jsonl")
    (folder / "README.md").write_text(f"---\n{head}\n---\n")
    assert "head cannot be read" in refused(folder)


# --- what save_to_disk wrote ------------------------------------------------------------------------------------------


def texts(word: str, count: int = 5) -> list[dict[str, Any]]:
    return [{"text": f"{word} {i}", "turns": [{"role": "user", "n": i}]} for i in range(count)]


def test_a_saved_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(texts("a")).save_to_disk(folder)
    before = sorted(folder.rglob("*"))
    assert datafolder.stored(folder)
    assert list(datafolder.rows(folder, "train")) == texts("a")
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(DataError, match=r"no split test.*train"):
        datafolder.rows(folder, "test")


def test_a_saved_dict_of_splits(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    rows = {"train": texts("a"), "held": texts("b", 2)}
    datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in rows.items()}).save_to_disk(folder)
    assert datafolder.stored(folder)
    assert list(datafolder.rows(folder, "held")) == rows["held"]
    with pytest.raises(DataError, match=r"no split test.*train, held"):
        datafolder.rows(folder, "test")
    (folder / "dataset_dict.json").write_text('{"splits": ["../saved/train"]}')
    with pytest.raises(DataError, match="no split"):
        datafolder.rows(folder, "../saved/train")


def test_a_saved_split_has_its_name_and_all_its_columns(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list(texts("a"), split="validation")
    part.with_format("numpy", columns=["text"]).save_to_disk(tmp_path)
    assert list(datafolder.rows(tmp_path, "validation")) == texts("a")


def test_images_stay_the_bytes_they_are(tmp_path: Path) -> None:
    features = datasets.Features({"page": datasets.Image(), "text": datasets.Value("string")})
    rows = [{"page": {"bytes": b"no image at all", "path": None}, "text": "a"}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path)
    assert list(datafolder.rows(tmp_path, "train")) == rows


def test_a_folder_that_nobody_saved(tmp_path: Path) -> None:
    assert not datafolder.stored(fill(tmp_path, "train.jsonl", "state.json"))
    assert not datafolder.stored(tmp_path / "absent")


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("keep", [None, 0, 20])
def test_a_saved_dataset_that_is_damaged(tmp_path: Path, name: str, keep: int | None) -> None:
    datasets.Dataset.from_list(texts("a")).save_to_disk(tmp_path)
    path = tmp_path / name
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="cannot be read") as caught:
        list(datafolder.rows(tmp_path, "train"))
    assert str(tmp_path) in str(caught.value)
