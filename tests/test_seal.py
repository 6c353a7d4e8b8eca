"""Sealing a release: what is refused, what a crash leaves, and signatures through model-signing's own code."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from finetune import runfolder, seal, signature, verify
from finetune.errors import EnvironmentFault, ModelError
from tests.test_verify import PAYLOAD, fill, flip, relist, run


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = fill(tmp_path / "release")
    seal.write(folder, {"base": "tiny"})
    return folder


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a\rb"], "carriage return"),
        ([os.fsdecode(b"b\xffd")], "not UTF-8"),
        (["Weights", "weights"], "weights and Weights are one name"),
        (["Sub/a", "sub/b"], "sub and Sub are one name"),
        (["caf\u00e9", "cafe\u0301"], "are one name"),
        (["Model.Sig"], "Model.Sig and model.sig are one name"),
        (["a", "model.sig"], "is signed"),
        ([], "no file to release"),
        (["SHA256SUMS"], "no file to release"),
    ],
)
def test_what_would_not_arrive_as_it_is_is_refused(tmp_path: Path, names: list[str], says: str) -> None:
    folder = fill(tmp_path / "r", dict.fromkeys(names, b"x"))
    folder.mkdir(exist_ok=True)
    with pytest.raises(ModelError, match=says):
        seal.write(folder, {})
    assert not (folder / "manifest.json").exists()


def test_links_and_hollow_folders_are_refused_together(release: Path) -> None:
    (release / "link").symlink_to("README.md")
    (release / "hollow").mkdir()
    with pytest.raises(ModelError) as caught:
        seal.write(release, {})
    assert [fault.what for fault in caught.value.faults] == [
        "cannot release: hollow is a folder without files",
        "cannot release: link is a symbolic link, not a file",
    ]


def test_a_manifest_of_another_kind_is_replaced(tmp_path: Path) -> None:
    folder = fill(tmp_path / "r", {"w": b"x", "manifest.json": b'{"sha256": {"w": "?"}}'})
    seal.write(folder, {})
    assert verify.faults(folder) == []


def test_written_twice_it_is_the_same_bytes(release: Path) -> None:
    before = {name: (release / name).read_bytes() for name in verify.listing(release)[0]}
    seal.write(release, {"base": "tiny"})
    assert {name: (release / name).read_bytes() for name in verify.listing(release)[0]} == before


def test_a_crash_leaves_an_unfinished_release_never_one_that_seems_whole(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each write in turn, over a folder that was sealed before."""
    really = runfolder.write_atomic
    fill(release, {"more": b"x"})
    for allowed in (0, 1):
        left = [None] * allowed

        def stops(path: Path, data: bytes, left: list[None] = left) -> None:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            really(path, data)

        monkeypatch.setattr(seal, "write_atomic", stops)
        with pytest.raises(KeyboardInterrupt):
            seal.write(release, {"base": "other"})
        assert "SHA256SUMS is missing" in verify.faults(release)
    monkeypatch.setattr(seal, "write_atomic", really)
    seal.write(release, {"base": "other"})
    assert verify.faults(release) == []


def test_a_manifest_that_no_receiver_would_read_is_not_written(release: Path) -> None:
    with pytest.raises(ModelError, match="16 MiB"):
        seal.write(release, {"long": "x" * verify.LIMIT})


# ── signatures ────────────────────────────────────────────────────────────────────────────────────────────────────────


def installed() -> bool:
    try:
        import model_signing
    except ImportError:
        return False
    return bool(model_signing)


needs_signing = pytest.mark.skipif(not installed(), reason="model-signing is not installed (extra: sign)")


@pytest.mark.skipif(installed(), reason="model-signing is installed")
def test_without_the_package_the_extra_is_named(release: Path, tmp_path: Path) -> None:
    fill(release, {"model.sig": b""})
    with pytest.raises(EnvironmentFault, match=r"finetune-qwen\[sign\]"):
        seal.sign(release, tmp_path / "key")
    with pytest.raises(signature.CannotCheck, match=r"finetune-qwen\[sign\]"):
        signature.check_signature(release, tmp_path / "key")


class Keys(NamedTuple):
    private: Path
    public: Path


def make_keys(folder: Path, curve: str = "P-256") -> Keys:
    """By the commands that signature.py names."""
    folder.mkdir()
    private, public = folder / "private.pem", folder / "public.pem"
    option = f"ec_paramgen_curve:{curve}"
    openssl = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", option, "-out", private]
    subprocess.run(openssl, check=True, capture_output=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return Keys(private, public)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl here to make keys with")
    return make_keys(tmp_path / "keys")


@pytest.fixture
def signed(release: Path, keys: Keys) -> Path:
    seal.sign(release, keys.private)
    return release


def model_signing(verb: str, folder: Path, key: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    option = "--private_key" if verb == "sign" else "--public_key"
    command = [sys.executable, "-m", "model_signing", verb, "key", folder, "--signature", folder / "model.sig"]
    return run(*command, option, key, "--no-ignore-git-paths", *more)


@needs_signing
@pytest.mark.parametrize("curve", ["P-256", "P-384", "P-521"])
def test_a_signed_release_holds_under_any_name(release: Path, tmp_path: Path, curve: str) -> None:
    keys = make_keys(tmp_path / "keys", curve)
    fill(release, {".gitattributes": b"*.safetensors filter=lfs\n", "odd\n\\name": b"x"})
    seal.write(release, {})
    seal.sign(release, keys.private)
    copy = shutil.copytree(release, tmp_path / "another name")
    (tmp_path / "linked").symlink_to(copy)
    for folder in (release, copy, tmp_path / "linked"):
        assert verify.faults(folder) == []
        assert signature.check_signature(folder, keys.public) == []
    assert run("sha256sum", "--strict", "-c", "SHA256SUMS", cwd=copy).returncode == 0
    done = model_signing("verify", copy, keys.public)
    assert (done.returncode, done.stdout) == (0, "Verification succeeded\n"), done.stderr
    fill(copy, {".cache/huggingface/download/x.metadata": b"x"})
    assert signature.check_signature(copy, keys.public) == []
    (copy / ".gitattributes").write_text("")
    assert ".gitattributes" in signature.check_signature(copy, keys.public)[0]
    assert model_signing("verify", copy, keys.public).returncode == 1


@needs_signing
@pytest.mark.parametrize("name", [*PAYLOAD, "manifest.json"])
def test_an_attacker_who_writes_new_digests_is_found_by_the_signature(signed: Path, keys: Keys, name: str) -> None:
    data = (signed / name).read_bytes()
    (signed / name).write_bytes(data.replace(b"tiny", b"ours") if name == "manifest.json" else data + b"x")
    signature_before = (signed / "model.sig").read_bytes()
    (signed / "model.sig").unlink()
    if name != "manifest.json":
        seal.write(signed, {"base": "tiny"})
    (signed / "model.sig").write_bytes(signature_before)
    relist(signed)
    assert verify.faults(signed) == []
    (fault,) = signature.check_signature(signed, keys.public)
    assert name in fault
    assert model_signing("verify", signed, keys.public).returncode == 1


@needs_signing
def test_another_key_no_signature_and_no_key_are_told_apart(signed: Path, keys: Keys, tmp_path: Path) -> None:
    other = make_keys(tmp_path / "other")
    assert signature.check_signature(signed, other.public)[0].startswith("model.sig does not hold against")
    for bad in (keys.private, tmp_path / "nothing", signed / "README.md"):
        with pytest.raises(signature.CannotCheck, match="cannot check against"):
            signature.check_signature(signed, bad)
    seal.sign(signed, other.private)  # signed anew by someone else
    assert verify.faults(signed) == []
    assert signature.check_signature(signed, other.public) == []
    assert len(signature.check_signature(signed, keys.public)) == 1
    (signed / "model.sig").unlink()
    relist(signed)
    assert verify.faults(signed) == []
    assert signature.check_signature(signed, keys.public) == ["model.sig is missing: this release is not signed"]


@needs_signing
def test_a_forged_hint_does_not_make_another_key_pass(signed: Path, keys: Keys, tmp_path: Path) -> None:
    """The file says which key made it; with that word changed to ours, the signature itself must still fail."""
    bundle = json.loads((signed / "model.sig").read_text())
    seal.sign(signed, make_keys(tmp_path / "other").private)
    forged = json.loads((signed / "model.sig").read_text())
    forged["verificationMaterial"] = bundle["verificationMaterial"]
    (signed / "model.sig").write_text(json.dumps(forged))
    assert signature.check_signature(signed, keys.public) == [
        f"model.sig does not hold against {keys.public}: it was made by another key, or is damaged"
    ]


@needs_signing
def test_a_genuine_signature_that_leaves_files_out_is_refused(release: Path, keys: Keys) -> None:
    """model-signing obeys the list of ignored files inside a signature; a release has no such files."""
    ignored = [release / "weights", release / "SHA256SUMS"]
    done = model_signing(
        "sign", release, keys.private, *(word for path in ignored for word in ("--ignore-paths", path))
    )
    assert done.returncode == 0, done.stderr
    assert model_signing("verify", release, keys.public).returncode == 0
    (fault,) = signature.check_signature(release, keys.public)
    assert "weights/model-1.safetensors" in fault


@needs_signing
def test_a_damaged_signature_is_a_fault_and_no_crash(signed: Path, keys: Keys) -> None:
    """Whatever it is, with the key; and every flipped bit of it, without."""
    path = signed / "model.sig"
    before = path.read_bytes()
    for data in (b"", b"{}", b"[]", b"\xff", b"[" * 100_000, before[:-9], before.replace(b'"sig"', b'"gis"')):
        path.write_bytes(data)
        assert len(signature.check_signature(signed, keys.public)) == 1
        assert any("model.sig" in fault for fault in verify.faults(signed))
    os.truncate(path, verify.LIMIT + 1)
    assert "larger than 16 MiB" in signature.check_signature(signed, keys.public)[0]
    for bit in range(0, len(before) * 8, 17):
        path.write_bytes(before)
        flip(path, bit)
        assert any("model.sig" in fault for fault in verify.faults(signed)), bit


@needs_signing
def test_every_bit_of_the_signed_statement_counts(signed: Path, keys: Keys) -> None:
    bundle = json.loads((signed / "model.sig").read_text())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    for place in range(0, len(payload), 97):
        changed = bytearray(payload)
        changed[place] ^= 1
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(changed).decode()
        (signed / "model.sig").write_text(json.dumps(bundle))
        assert len(signature.check_signature(signed, keys.public)) == 1


@needs_signing
def test_a_folder_that_is_not_as_listed_gets_no_signature(release: Path, keys: Keys, tmp_path: Path) -> None:
    (release / "README.md").write_text("other")
    with pytest.raises(ModelError, match=r"README\.md is not as SHA256SUMS lists it"):
        seal.sign(release, keys.private)
    (release / "README.md").write_bytes(PAYLOAD["README.md"])
    fill(release, {"more": b""})
    with pytest.raises(ModelError, match="more is not as"):
        seal.sign(release, keys.private)
    (release / "more").unlink()
    (release / "link").symlink_to("README.md")
    with pytest.raises(ModelError, match="symlink"):
        seal.sign(release, keys.private)
    (release / "link").unlink()
    assert verify.faults(release) == []
    assert not (release / "model.sig").exists()
    flip(release / "SHA256SUMS", 4)
    with pytest.raises(ModelError, match="SHA256SUMS"):
        seal.sign(release, keys.private)
    with pytest.raises(ModelError, match="no release"):
        seal.sign(fill(tmp_path / "other", {"w": b""}), keys.private)


@needs_signing
def test_a_key_that_cannot_sign_is_refused_by_name(release: Path, keys: Keys) -> None:
    locked = keys.private.with_name("locked.pem")
    words = ["openssl", "ec", "-in", keys.private, "-aes256", "-passout", "pass:x", "-out", locked]
    subprocess.run(words, check=True, capture_output=True)
    rsa = keys.private.with_name("rsa.pem")
    subprocess.run(["openssl", "genpkey", "-algorithm", "RSA", "-out", rsa], check=True, capture_output=True)
    for bad in (locked, rsa, keys.public, keys.private.with_name("nothing")):
        with pytest.raises(EnvironmentFault, match="cannot sign with this key") as caught:
            seal.sign(release, bad)
        assert str(bad) in str(caught.value)
        assert "openssl genpkey" in str(caught.value)
    assert verify.faults(release) == []


def test_a_private_key_in_the_release_is_refused(release: Path, tmp_path: Path) -> None:
    fill(release, {"keys/private.pem": b""})
    with pytest.raises(EnvironmentFault, match="private key lies in the folder"):
        seal.sign(release, release / "keys" / "private.pem")


@needs_signing
def test_without_a_network_sigstore_is_a_coded_fault(
    release: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", closed)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(EnvironmentFault, match="cannot sign through Sigstore"):
        seal.sign(release, None)
    assert verify.faults(release) == []
    fill(release, {"model.sig": b"{}"})
    with pytest.raises(signature.CannotCheck, match="cannot check against Sigstore"):
        signature.check_sigstore(release, "someone@example.org", "https://example.org")
