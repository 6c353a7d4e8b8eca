"""Releases: every changed bit and every additional, missing or renamed file is found and named, by one file alone."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import seal, verify

SOURCE = Path(verify.__file__)
PAYLOAD = {
    "README.md": b"# A model\n",
    ".hidden": b"\x00\xff",
    "weights/model-1.safetensors": random.Random(1).randbytes(3000),
    "weights/model-2.safetensors": random.Random(2).randbytes(1),
    "weights/empty": b"",
    "tokenizer/deep/vocab.txt": "é\n".encode() * 40,
}
PROVENANCE = {"base": "tiny", "recipe": {"steps": 3}}


def fill(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    for name, data in (PAYLOAD if files is None else files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A sealed release of a few files, with a file in the signature's place (what that says is another test's)."""
    folder = fill(tmp_path / "release")
    seal.write(folder, PROVENANCE)
    (folder / verify.SIGNATURE).write_bytes(random.Random(3).randbytes(700))
    relist(folder)
    return folder


def relist(folder: Path) -> None:
    """What an attacker does: write the SHA256SUMS that fits the files now there."""
    names = [name for name in verify.listing(folder)[0] if name != verify.SUMS]
    (folder / verify.SUMS).write_bytes(verify.sums(verify.digests(folder, names)[0]))


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd, timeout=60)


def test_a_whole_release_holds_and_says_what_it_is_made_of(release: Path) -> None:
    assert verify.faults(release) == []
    stored = json.loads((release / "manifest.json").read_bytes())
    assert stored["sha256"] == {name: hashlib.sha256(data).hexdigest() for name, data in PAYLOAD.items()}
    assert stored["provenance"] == PROVENANCE
    listed = verify.listed_in((release / "SHA256SUMS").read_bytes())
    assert set(listed) == {*PAYLOAD, "manifest.json", "model.sig"}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_thousand_flipped_bits_are_found_and_named(release: Path) -> None:
    source = random.Random(4)
    names = [name for name in verify.listing(release)[0] if (release / name).stat().st_size]
    assert {*verify.OURS} < {*names}
    for _ in range(1000):
        name = source.choice(names)
        before = (release / name).read_bytes()
        flip(release / name, source.randrange(len(before) * 8))
        assert any(name in fault for fault in verify.faults(release)), name
        (release / name).write_bytes(before)
    assert verify.faults(release) == []


@pytest.mark.parametrize("name", ["SHA256SUMS", "manifest.json"])
def test_no_bit_of_our_own_files_is_free(release: Path, name: str) -> None:
    """All of them, for what guards these two files is not only a digest. Every seventh bit, which meets each byte."""
    path = release / name
    before = path.read_bytes()
    for bit in range(0, len(before) * 8, 7):
        flip(path, bit)
        assert any(name in fault for fault in verify.faults(release)), bit
        path.write_bytes(before)


def test_the_notes_of_a_download_are_not_judged(release: Path) -> None:
    fill(release, {".cache/huggingface/download/config.json.metadata": b"x", ".cache/huggingface/.gitignore": b"*"})
    assert verify.faults(release) == []
    fill(release, {".cache/other": b"x", "sub/.cache/huggingface/x": b"x"})
    found = " ".join(verify.faults(release))
    assert ".cache/other was added" in found
    assert "sub/.cache/huggingface/x was added" in found
    name = next(iter(PAYLOAD))
    (release / name).write_bytes(b"other")
    assert any(f"{name} is damaged" in fault for fault in verify.faults(release))


def test_fifty_files_added_removed_or_renamed_are_found_and_named(release: Path, tmp_path: Path) -> None:
    source = random.Random(5)
    for turn in range(50):
        folder = tmp_path / "work"
        shutil.copytree(release, folder)
        names, _ = verify.listing(folder)
        name = source.choice(names)
        other = source.choice(["new", "weights/new", ".new", "a/b/new", name.swapcase(), f"{name}~", f"{name} "])
        if turn % 3 == 0:
            fill(folder, {other: source.choice([b"", b"x", (folder / name).read_bytes()])})
            touched = [other]
        elif turn % 3 == 1:
            (folder / name).unlink()
            touched = [name]
        else:
            (folder / other).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(folder / other)
            touched = [name, other]
        found = verify.faults(folder)
        for one in touched:
            assert any(one in fault for fault in found), (one, found)
        shutil.rmtree(folder)


def test_each_fault_says_what_happened(release: Path) -> None:
    (release / "weights/model-1.safetensors").write_bytes(b"other")
    (release / "weights/empty").unlink()
    (release / "more\x1b[2J").write_text("")
    assert verify.faults(release) == [
        "'more\\x1b[2J' was added: neither manifest.json nor SHA256SUMS knows it",
        "weights/empty is missing",
        "weights/model-1.safetensors is damaged: its digest differs",
    ]


def test_two_exchanged_files_are_two_damaged_ones(release: Path) -> None:
    one, two = release / "README.md", release / ".hidden"
    one.rename(release / "aside"), two.rename(one), (release / "aside").rename(two)
    assert [fault.split()[0] for fault in verify.faults(release)] == [".hidden", "README.md"]


def test_a_file_that_only_one_list_knows_is_a_fault(release: Path) -> None:
    fill(release, {"more": b"x"})
    relist(release)
    assert verify.faults(release) == ["more is not in manifest.json"]


def test_a_payload_changed_together_with_sha256sums_is_found_by_the_manifest(release: Path) -> None:
    (release / "README.md").write_text("other")
    relist(release)
    assert verify.faults(release) == ["manifest.json is damaged: it has another digest for README.md"]


def edited(release: Path, change: Callable[[str], str]) -> list[str]:
    path = release / "SHA256SUMS"
    path.write_bytes(change(path.read_bytes().decode()).encode())
    return verify.faults(release)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\n".join(reversed(text.splitlines())) + "\n",
        lambda text: text + text.splitlines()[0] + "\n",
        lambda text: text[:-1],
        lambda text: text + "\n",
        lambda text: text + "#",
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("  ", " *"),
        lambda text: "\\" + text,
        lambda text: text + "0" * 64 + "  SHA256SUMS\n",
        lambda text: text + "0" * 64 + "  ../x\n",
        lambda text: text + "0" * 64 + "  /etc/passwd\n",
        lambda text: "\ufeff" + text,
        lambda text: "",
    ],
)
def test_sha256sums_has_one_right_form(release: Path, change: Callable[[str], str]) -> None:
    """Each of these is another text that sha256sum itself would take, or nearly; none of it is left unseen."""
    assert any(fault.startswith("SHA256SUMS is damaged") for fault in edited(release, change))


def rewritten(release: Path, manifest: bytes) -> list[str]:
    """Another manifest, with digests that fit: what an attacker would write."""
    (release / "manifest.json").write_bytes(manifest)
    relist(release)
    return verify.faults(release)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../x", "no path inside"),
        ("a/../../x", "no path inside"),
        ("/etc/passwd", "no path inside"),
        ("./README.md", "no path inside"),
        ("weights//empty", "no path inside"),
        ("weights/", "no path inside"),
        ("", "no path inside"),
        ("a\\u0000b", "no path inside"),
        ("SHA256SUMS", "no payload"),
        ("model.sig", "no payload"),
    ],
)
def test_a_manifest_cannot_name_what_is_no_payload(release: Path, name: str, says: str) -> None:
    (release.parent / "x").write_text("")
    text = (release / "manifest.json").read_text().replace('"sha256": {', f'"sha256": {{"{name}": "{"0" * 64}",')
    assert any("manifest.json is damaged" in fault and says in fault for fault in rewritten(release, text.encode()))


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (b'{"release": 1, "sha256": {"README.md": 5}}', "no sha-256"),
        (b'{"release": 1, "sha256": {"README.md": "%s"}}' % (b"A" * 64), "no sha-256"),
        (b'{"release": 1, "release": 1, "sha256": {}}', "'release' twice"),
        (b'{"release": 2, "sha256": {}}', "format 2"),
        (b'{"sha256": {}}', "not the manifest of a release"),
        (b'{"release": 1, "sha256": []}', "not the manifest of a release"),
        (b"[" * 100_000, "recursion"),
        (b"\xff\xfe\x00", "decode"),
        (b'{"release": 1, "x": ' + b"9" * 10_000 + b"}", "limit"),
        (b" " * (verify.LIMIT + 1), "larger than 16 MiB"),
    ],
)
def test_a_hostile_manifest_is_a_fault_and_no_crash(release: Path, manifest: bytes, says: str) -> None:
    assert any("manifest.json is damaged" in fault and says in fault for fault in rewritten(release, manifest))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("repeated", [b"", b', "199999": 1'])
def test_a_manifest_as_long_as_allowed_is_judged_in_seconds(release: Path, repeated: bytes) -> None:
    """A hostile one may name very many files that are not there; work that grows with its square would take hours."""
    entries = b", ".join(b'"%d": "%s"' % (number, b"0" * 64) for number in range(200_000))
    found = rewritten(release, b'{"release": 1, "sha256": {' + entries + repeated + b"}}")
    assert len(found) == (1 if repeated else 200_000 + len(PAYLOAD))


def test_what_no_digest_covers_is_a_fault(release: Path) -> None:
    (release / "link").symlink_to("README.md")
    (release / "weights/empty").unlink()
    (release / "weights/empty").symlink_to("/dev/null")  # reads as the empty file that belongs there
    (release / "hollow/deeper").mkdir(parents=True)
    os.mkfifo(release / "pipe")  # opening it would wait for ever
    assert verify.faults(release) == [
        "hollow/deeper is a folder without files",
        "link is a symbolic link, not a file",
        "pipe is neither a file nor a folder",
        "weights/empty is a symbolic link, not a file",
        "weights/empty is missing",
    ]


def test_a_linked_folder_of_files_is_not_entered(release: Path, tmp_path: Path) -> None:
    shutil.move(release / "weights", tmp_path / "elsewhere")
    (release / "weights").symlink_to(tmp_path / "elsewhere")
    found = verify.faults(release)
    assert "weights is a symbolic link, not a file" in found
    assert "weights/empty is missing" in found


def test_modes_and_times_are_not_content(release: Path) -> None:
    (release / "README.md").chmod(0o755)
    os.utime(release / "README.md", (0, 0))
    assert verify.faults(release) == []


def test_an_unreadable_file_is_named_and_the_others_are_judged(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the system's answer, for tests may run as a user who can read everything."""
    (release / ".hidden").write_bytes(b"changed")
    really = Path.open

    def opened(path: Path, *args: object, **words: object) -> object:
        if path.name in ("README.md", "SHA256SUMS"):
            raise PermissionError(13, "Permission denied", str(path))
        return really(path, *args, **words)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opened)
    assert verify.faults(release) == [
        "SHA256SUMS cannot be read: Permission denied",
        "README.md cannot be read: Permission denied",
        ".hidden is damaged: its digest differs",
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [("big", "[]"), ("manifest.json", "it is larger than 16 MiB"), ("SHA256SUMS", "it is larger than")],
)
def test_what_cannot_lie_in_memory_is_not_read_into_it(tmp_path: Path, name: str, says: str) -> None:
    folder = fill(tmp_path / "r", {"big": b""})
    seal.write(folder, {})
    size = 400 * 1024**2
    os.truncate(folder / name, size)  # sparse: no disk is used
    if name == "big":
        seal.write(folder, {})
    code = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import verify; from pathlib import Path;"
    code += "print(verify.faults(Path(sys.argv[1])), Path('/proc/self/status').read_text())"
    done = run(sys.executable, "-I", "-S", "-c", code, folder)
    assert says in done.stdout, done.stderr
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert peak is not None
    assert int(peak[1]) * 1024 < size / 4


@pytest.mark.parametrize("files", [{}, {"manifest.json": b'{"sha256": {}}', "w": b""}, {"SHA256SUMS": b"", "w": b""}])
def test_a_folder_that_is_no_release_is_not_called_a_damaged_one(tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = fill(tmp_path / "r", files)
    folder.mkdir(exist_ok=True)
    with pytest.raises(verify.NoRelease, match="SHA256SUMS"):
        verify.faults(folder)
    with pytest.raises(verify.NoRelease, match="no such folder"):
        verify.faults(tmp_path / "nothing")


@pytest.mark.parametrize("lost", ["manifest.json", "SHA256SUMS"])
def test_a_release_that_lost_one_of_our_files_is_a_damaged_one(release: Path, lost: str) -> None:
    (release / lost).unlink()
    assert verify.faults(release) == [f"{lost} is missing"]
    (release / "README.md").unlink()
    assert verify.faults(release) == [f"{lost} is missing", "README.md is missing"]


# ── the one file, without this package ────────────────────────────────────────────────────────────────────────────────


def test_it_imports_the_standard_library_and_nothing_else() -> None:
    tree = ast.parse(SOURCE.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) if not node.level}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | names
    assert not used & {"__import__", "importlib", "exec", "eval", "compile", "runpy"}


def test_it_runs_where_everything_else_is_blocked(release: Path) -> None:
    """Also signature.py, up to the point where it needs its package, is no more than the standard library."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "finetune"}:
            raise AssertionError(f"{name} was imported")
        if name.startswith("finetune.") and name not in ("finetune.verify", "finetune.signature"):
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv.pop(1))
from finetune import signature, verify
sys.exit(verify.main())
"""
    for switches in (["-I", "-S"], []):
        done = run(sys.executable, *switches, "-c", code, SOURCE.parents[1], release)
        assert (done.returncode, done.stdout) == (0, "every file holds; a signature was not checked\n"), done.stderr


def as_module(folder: Path) -> list[str | Path]:
    return [sys.executable, "-m", "finetune.verify", folder]


def as_file(folder: Path) -> list[str | Path]:
    return [sys.executable, SOURCE, folder]


def as_copy(folder: Path) -> list[str | Path]:
    shutil.copy(SOURCE, folder.parent / "check.py")
    return [sys.executable, "-I", "-S", folder.parent / "check.py", folder]


@pytest.mark.parametrize("way", [as_module, as_file, as_copy])
def test_run_as_a_command_it_answers_by_exit_code(release: Path, way: Callable[[Path], list[str | Path]]) -> None:
    root = SOURCE.parents[1]
    done = run(*way(release), cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    (release / "README.md").write_text("other")
    fill(release, {os.fsdecode(b"b\xffd"): b""})
    done = run(*way(release), cwd=root)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "README.md is damaged: its digest differs",
        "'b\\udcffd' was added: neither manifest.json nor SHA256SUMS knows it",
    ]
    for other in (release / "weights", release / "README.md", release / "nothing"):
        done = run(
            *way(other) if way is not as_copy else way(release)[:-1], *([other] if way is as_copy else []), cwd=root
        )
        assert (done.returncode, done.stdout) == (4, "")
        assert done.stderr.startswith("no release: ")


# ── sha256sum ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ODD = [
    "new\nline",
    "back\\slash",
    "\\n",
    " lead",
    "trail ",
    "*star",
    "-dash",
    "tab\tx",
    "ünï",
    "a\u2028b",
    "sub dir/\n\\",
]
needs_sha256sum = pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum here")


@needs_sha256sum
def test_sha256sum_reads_and_would_write_the_same_text(tmp_path: Path) -> None:
    folder = fill(tmp_path / "r", {name: name.encode() for name in ODD})
    seal.write(folder, {})
    assert verify.faults(folder) == []
    done = run("sha256sum", "--strict", "-c", "SHA256SUMS", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": OK") == len(ODD) + 1
    names = sorted([*ODD, "manifest.json"])
    written = subprocess.run(["sha256sum", "--", *names], cwd=folder, capture_output=True, check=True).stdout
    assert written == (folder / "SHA256SUMS").read_bytes()


@needs_sha256sum
@pytest.mark.parametrize("name", ["manifest.json", "model.sig", "weights/model-2.safetensors"])
def test_sha256sum_names_a_damaged_file(release: Path, name: str) -> None:
    assert run("sha256sum", "--strict", "-c", "SHA256SUMS", cwd=release).returncode == 0
    flip(release / name, 5)
    done = run("sha256sum", "--strict", "-c", "SHA256SUMS", cwd=release)
    assert done.returncode == 1
    assert re.findall(r"(.*): FAILED", done.stdout) == [name]
