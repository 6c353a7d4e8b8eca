"""llama.cpp's converters: only the pinned ones run, in a child that is told no secrets; and what its failures say."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune import llamacpp
from finetune.errors import EnvironmentFault, FinetuneError, ModelError

ROOT = f"llama_cpp_python-{llamacpp.VERSION}"
SOURCE = f"{ROOT}/vendor/llama.cpp"
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
# What pip runs of a source archive to learn its name: here it leaves a trace that it ran.
BACKEND = """
import os, pathlib
def get_requires_for_build_wheel(settings=None): return []
def prepare_metadata_for_build_wheel(folder, settings=None):
    pathlib.Path({canary!r}).touch()
    made = pathlib.Path(folder) / "llama_cpp_python-{version}.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: {version}\\n")
    return made.name
def build_wheel(*arguments): raise SystemExit("never built")
"""
WANTED = {
    "LICENSE": b"licence",
    "convert_hf_to_gguf.py": b"print(1)",
    "convert_lora_to_gguf.py": b"print(2)",
    "conversion/base.py": b"base",
    "gguf-py/gguf/__init__.py": b"gguf",
}


def say(text: str) -> None:
    pass


def entry(
    name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
    return member, data


def archive(path: Path, *more: tuple[tarfile.TarInfo, bytes], canary: Path = Path("/nowhere")) -> Path:
    backend = BACKEND.format(canary=str(canary), version=llamacpp.VERSION).encode()
    members = [entry(f"{SOURCE}/{name}", data) for name, data in WANTED.items()]
    members += [entry(f"{ROOT}/pyproject.toml", PYPROJECT.encode()), entry(f"{ROOT}/backend.py", backend)]
    members += [
        entry(
            f"{ROOT}/PKG-INFO", f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {llamacpp.VERSION}\n".encode()
        )
    ]
    with tarfile.open(path, "w:gz") as opened:
        for member, data in (*members, *more):
            opened.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_wanted_files_leave_the_archive(tmp_path: Path) -> None:
    made = archive(
        tmp_path / "a.tar.gz",
        entry("../evil.py"),
        entry("/tmp/evil.py"),
        entry(f"{SOURCE}/../../../evil.py"),
        entry(f"{SOURCE}/conversion/../../evil.py"),
        entry(f"{SOURCE}/conversion/deep/evil.py"),
        entry(f"{SOURCE}/torch.py"),
        entry(f"{SOURCE}/conversion/big.py", b"x" * 4_000_001),
        entry(f"{SOURCE}/conversion/link.py", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        entry(f"{SOURCE}/conversion/hard.py", kind=tarfile.LNKTYPE, link=f"{ROOT}/backend.py"),
        entry(f"{SOURCE}/conversion/pipe.py", kind=tarfile.FIFOTYPE),
    )
    llamacpp._unpack(made, tmp_path / "out")
    assert files(tmp_path / "out") == WANTED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "out"]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place that pip looks for packages in, with a small archive, pinned; and an empty cache of the user's."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    made = archive(shelf / f"{ROOT}.tar.gz", canary=tmp_path / "canary")
    llamacpp._unpack(made, tmp_path / "kept")
    monkeypatch.setattr(llamacpp, "ARCHIVE_SHA256", hashlib.sha256(made.read_bytes()).hexdigest())
    monkeypatch.setattr(llamacpp, "FILES_SHA256", llamacpp.files_digest(tmp_path / "kept"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.delenv(llamacpp.VARIABLE, raising=False)
    return shelf


def test_fetched_once_and_mended_when_altered(index: Path, tmp_path: Path) -> None:
    folder = llamacpp.converters(say)
    assert files(folder) == WANTED
    assert folder.parent == tmp_path / "cache" / "finetune"
    (index / f"{ROOT}.tar.gz").rename(tmp_path / "aside")
    assert llamacpp.converters(say) == folder  # from the cache
    (tmp_path / "aside").rename(index / f"{ROOT}.tar.gz")
    (folder / "conversion" / "base.py").write_bytes(b"evil")
    assert files(llamacpp.converters(say)) == WANTED
    (folder / "torch.py").write_bytes(b"found before the real one")
    assert files(llamacpp.converters(say)) == WANTED
    (folder / "torch").symlink_to(tmp_path)
    assert files(llamacpp.converters(say)) == WANTED


def test_another_archive_is_refused_before_anything_of_it_runs(index: Path, tmp_path: Path) -> None:
    assert llamacpp.converters(say)
    assert (tmp_path / "canary").exists()  # pip runs an archive's own code, hence the digest before
    (tmp_path / "canary").unlink()
    folder = tmp_path / "cache" / "finetune"
    archive(index / f"{ROOT}.tar.gz", entry(f"{SOURCE}/conversion/more.py"), canary=tmp_path / "canary")
    (folder / f"llama.cpp-{llamacpp.VERSION}" / "LICENSE").unlink()
    with pytest.raises(EnvironmentFault, match="could not be fetched") as raised:
        llamacpp.converters(say)
    assert llamacpp.VARIABLE in raised.value.faults[0].fix
    assert not (tmp_path / "canary").exists()


def test_without_a_network_one_line_says_what_to_do(index: Path, tmp_path: Path) -> None:
    (index / f"{ROOT}.tar.gz").unlink()
    with pytest.raises(EnvironmentFault, match="could not be fetched") as raised:
        llamacpp.converters(say)
    assert str(raised.value).count("\n") == 0
    assert f"set {llamacpp.VARIABLE} to its folder" in str(raised.value)
    left = {path.name for path in (tmp_path / "cache" / "finetune").iterdir()}
    assert left <= {f"llama.cpp-{llamacpp.VERSION}.lock"}


def test_a_kill_while_filling_leaves_nothing_half(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = llamacpp._unpack

    def killed(source: Path, out: Path) -> None:
        real(source, out)
        (out / "LICENSE").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(llamacpp, "_unpack", killed)
    with pytest.raises(KeyboardInterrupt):
        llamacpp.converters(say)
    monkeypatch.setattr(llamacpp, "_unpack", real)
    assert files(llamacpp.converters(say)) == WANTED


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A checkout of the user's own, whose converter is the given code; ``out`` and ``args`` are set in it."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    monkeypatch.setenv(llamacpp.VARIABLE, str(folder))

    def write(code: str) -> Path:
        head = "import sys\nargs = sys.argv[1:]\nout = args[args.index('--outfile') + 1]\n"
        for name in (llamacpp.MODEL, llamacpp.ADAPTER):
            (folder / name).write_text(head + code)
        return folder

    return write


def convert(tmp_path: Path, say: llamacpp.Say = say) -> Path:
    (tmp_path / "{braces}").mkdir(exist_ok=True)
    out = tmp_path / "{braces}" / "model.gguf"
    llamacpp.convert(llamacpp.MODEL, tmp_path, out, ["--outtype", "f32"], say)
    return out


def test_a_folder_of_the_users_own_goes_first(checkout: Callable[[str], Path]) -> None:
    folder = checkout("")
    assert llamacpp.converters(say) == folder
    (folder / llamacpp.ADAPTER).unlink()
    with pytest.raises(EnvironmentFault, match=f"no {llamacpp.ADAPTER} in the folder that {llamacpp.VARIABLE} names"):
        llamacpp.converters(say)


def test_the_converter_sees_no_secret_and_no_hub(
    checkout: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SOMETHING_ELSE"):
        monkeypatch.setenv(name, "canary-7f3a")
    seen = "[dict(os.environ), args, sys.path, os.path.expanduser('~')]"
    folder = checkout(f"import helper, json, os\njson.dump({seen}, open(out, 'w'))")
    (folder / "helper.py").write_text("")
    environment, arguments, path, home = json.loads(convert(tmp_path).read_text())
    assert "canary-7f3a" not in json.dumps(environment)
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"
    assert home == environment["HF_HOME"] == str(tmp_path / "{braces}")
    assert arguments == [str(tmp_path), "--outfile", "model.gguf", "--outtype", "f32"]
    assert path[0] == str(folder)
    assert "" not in path
    assert not (folder / "__pycache__").exists()  # what was verified stays as it was


@pytest.mark.parametrize(
    ("code", "kind", "what"),
    [
        ("sys.exit('first line\\nthe reason\\x1b[31m')", ModelError, "the reason"),
        ("pass", ModelError, "llama.cpp's converter failed: it ended with 0"),
        (
            "raise NotImplementedError('BPE pre-tokenizer was not recognized')",
            ModelError,
            "does not know this tokenizer",
        ),
        ("import nothing_of_that_name", EnvironmentFault, "needs the package nothing_of_that_name"),
        ("raise OSError(28, 'No space left on device')", EnvironmentFault, "cannot write: No space left on device"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", EnvironmentFault, "killed by signal 9"),
    ],
    ids=["reason", "silent", "tokenizer", "package", "disk full", "killed"],
)
def test_a_failure_is_one_line_that_says_what_to_do(
    checkout: Callable[[str], Path], tmp_path: Path, code: str, kind: type[FinetuneError], what: str
) -> None:
    checkout(code)
    with pytest.raises(kind) as raised:
        convert(tmp_path)
    assert what in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert raised.value.faults[0].fix


def test_it_says_how_long_it_has_worked(checkout: Callable[[str], Path], tmp_path: Path) -> None:
    checkout("import time; time.sleep(2.5); open(out, 'w').close()")
    said: list[str] = []
    convert(tmp_path, said.append)
    assert said == ["converting to GGUF: 1s", "converting to GGUF: 2s"]


def test_interrupted_it_leaves_no_process_behind(checkout: Callable[[str], Path], tmp_path: Path) -> None:
    checkout(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")

    def interrupted(text: str) -> None:
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path, interrupted)
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)


def test_a_runtime_that_is_not_there_or_dies_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "llama_cpp"
    package.mkdir(parents=True)
    monkeypatch.setattr(llamacpp.importlib.util, "find_spec", lambda name: None)
    assert llamacpp.unusable() == "llama-cpp-python is not installed"
    monkeypatch.undo()
    (package / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(package.parent))
    assert "does not load" in llamacpp.unusable()
    with pytest.raises(ModelError, match=r"llama\.cpp failed"):
        llamacpp.ask({"verb": "probe", "model": "x.gguf"}, tmp_path, "asking", say)
    (package / "__init__.py").write_text("__version__ = '1'")
    assert llamacpp.unusable() == ""
