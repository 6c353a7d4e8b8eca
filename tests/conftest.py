"""What several tests share: the tiny bases, the committed data, the scripts under data/."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
if _WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: as the command sets it
_CACHE = tempfile.TemporaryDirectory(prefix="finetune-tests-")  # no test reads or fills the user's own cache
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is first imported: no test may reach a hub


def load_script(path: str) -> ModuleType:
    """A script of the repository as a module; data/ is no package."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    return load_script


@pytest.fixture(scope="session")
def build_tiny() -> Callable[..., Path]:
    """``build(folder, seed, family=…, dtype=…, max_shard_size=…, **config fields)`` of data/make_tiny_base.py."""
    build: Callable[..., Path] = load_script("data/make_tiny_base.py").build
    return build


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, build_tiny: Callable[..., Path]) -> Path:
    """A random Qwen2 base, untied, bf16, one shard. Shared by all tests: copy it before changing anything in it."""
    return build_tiny(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def tiny_base_sharded(tmp_path_factory: pytest.TempPathFactory, build_tiny: Callable[..., Path]) -> Path:
    """The same weights as ``tiny_base`` in several shards with an index."""
    return build_tiny(tmp_path_factory.mktemp("bases") / "tiny-sharded", max_shard_size="100KB")


@pytest.fixture(scope="session")
def dates() -> Path:
    """The folder of the committed dates task."""
    return ROOT / "data" / "dates"


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder with one small file for each data format."""
    return ROOT / "data" / "samples"


@pytest.fixture(scope="session")
def real_base() -> Path:
    """The fetched 135M base; skips where ``python data/fetch_base.py`` has not been run."""
    folder = ROOT / "data" / "bases" / "smollm2-135m-instruct"
    if not (folder / "digests.json").is_file():
        pytest.skip("the 135M base is not there: run python data/fetch_base.py")
    return folder


@pytest.fixture
def work(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workplace of its own (tests/runs.py) as the working folder, with nothing trained in it."""
    from tests import runs

    runs.furnish(tmp_path / "work")
    shutil.copytree(tiny_base, tmp_path / "work" / "base")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A workplace with one finished run. Shared by all tests: take ``finished`` to change anything in it."""
    from tests import runs

    folder = tmp_path_factory.mktemp("trained") / "work"
    runs.furnish(folder)
    shutil.copytree(tiny_base, folder / "base")
    before = Path.cwd()
    os.chdir(folder)
    try:
        said = runs.train()
    finally:
        os.chdir(before)
    assert said.code == 0, said.err
    return folder


@pytest.fixture
def finished(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the ``trained`` workplace as the working folder."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"
