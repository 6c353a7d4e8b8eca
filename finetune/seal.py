"""Seal a release: write the manifest and digests that verify.py judges, and sign them. Written last, in that order."""

from __future__ import annotations

import base64
import json
import tempfile
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from finetune import manifest, signature, verify
from finetune.errors import EnvironmentFault, Fault, ModelError
from finetune.runfolder import json_bytes, remove, sync_file, write_atomic

_KEY_HINT = "make one: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out private.pem"
_NO_SIGSTORE = "cannot sign through Sigstore: "


def write(folder: Path, provenance: dict[str, Any], progress: Callable[[int], None] = lambda count: None) -> None:
    """Write ``manifest.json`` (replacing one that is there) and ``SHA256SUMS`` over all files now in ``folder``.

    ``provenance`` says where the model comes from (base, data, recipe, lock); JSON values only. Every file is flushed
    to the disk before it is listed. ``progress`` as of ``verify.faults``.

    Raises:
        ModelError: something that no release can hold: links, empty folders, names that a receiver's file system or
            sha256sum would change, a signature, no files at all.
        EnvironmentFault: the disk.
    """
    names, odd = verify.listing(folder)
    faults = [Fault(f"cannot release: {text}", str(folder), "remove it, or put a file there") for text in odd]
    faults += [Fault(text, str(folder), "rename it") for text in _unsuitable(names)]
    if verify.SIGNATURE in names:
        what = f"this folder is signed; another {verify.MANIFEST} would make {verify.SIGNATURE} void"
        faults.append(Fault(what, str(folder), f"delete {verify.SIGNATURE}, and sign it anew afterwards"))
    payload = [name for name in names if name not in verify.OURS]
    if not payload:
        faults.append(Fault("there is no file to release", str(folder)))
    if faults:
        raise ModelError.of(faults)
    for name in payload:
        sync_file(folder / name)
    digests, unreadable = verify.digests(folder, payload, progress)
    if unreadable:
        raise ModelError.of([Fault(text, str(folder)) for text in unreadable])
    written = json_bytes({"release": verify.FORMAT, "sha256": digests, "provenance": provenance})
    remove(folder / verify.SUMS)  # a crash from here on leaves an unfinished release, never one that seems whole
    _put(folder / verify.MANIFEST, written)
    _put(folder / verify.SUMS, verify.sums(digests | {verify.MANIFEST: manifest.digest_bytes(written)}))


def faults(folder: Path, key: Path | None, progress: Callable[[int], None] = lambda count: None) -> list[str]:
    """Everything that does not hold of a release, and of its signature where a public ``key`` is given.

    ``progress`` as of ``verify.faults``.

    Raises:
        ModelError: the folder is no release.
        EnvironmentFault: the signature cannot be judged here.
    """
    try:
        found = verify.faults(folder, progress)
        return found + (signature.check_signature(folder, key) if key is not None else [])
    except verify.NoRelease as error:
        raise ModelError(str(error), str(folder), "name a folder that `finetune release` made") from None
    except signature.CannotCheck as error:
        raise EnvironmentFault(str(error), str(folder), "pip install 'finetune-qwen[sign]'") from None


def sign(folder: Path, key: Path | None) -> None:
    """Sign a written release, or sign it anew, and list the signature in ``SHA256SUMS``.

    ``key`` is an elliptic-curve private key (PEM, not encrypted); None goes through Sigstore, which needs the network
    and an identity: the one of the surroundings (in CI), else it asks for a login in the browser. What was signed is
    compared with ``SHA256SUMS`` before anything is written, so a folder that changed meanwhile gets no signature.

    Raises:
        ModelError: no release, or files that are not as it lists them.
        EnvironmentFault: model-signing is not installed, the key cannot be used, Sigstore cannot be reached, the disk.
    """
    folder = folder.resolve()
    if key is not None and key.resolve().is_relative_to(folder):
        what = "the private key lies in the folder that is to be published"
        raise EnvironmentFault(what, str(key), "move it out, and consider whether anyone has seen it")
    listed = _listed(folder)
    listed.pop(verify.SIGNATURE, None)
    with tempfile.TemporaryDirectory() as aside:
        _sign_into(Path(aside) / verify.SIGNATURE, folder, key)
        data = (Path(aside) / verify.SIGNATURE).read_bytes()
    signed = _signed(data)
    if differing := sorted(name for name in {*signed, *listed} if signed.get(name) != listed.get(name)):
        what = f"{verify.shown(differing[0])} is not as {verify.SUMS} lists it; nothing was signed"
        raise ModelError(what, str(folder), "run `finetune verify` on it, and make the release again")
    _put(folder / verify.SIGNATURE, data)
    _put(folder / verify.SUMS, verify.sums(listed | {verify.SIGNATURE: manifest.digest_bytes(data)}))


def _listed(folder: Path) -> dict[str, str]:
    try:
        return verify.listed_in(verify.bounded(folder / verify.SUMS))
    except FileNotFoundError:
        what = f"there is no {verify.SUMS}: this is no release, or an unfinished one"
    except ValueError as error:
        what = f"{verify.SUMS} is damaged: {verify.shown(str(error))}"
    raise ModelError(what, str(folder), "make the release again")


def _sign_into(target: Path, folder: Path, key: Path | None) -> None:
    """Have model-signing write its signature over ``folder`` to ``target``."""
    try:
        from model_signing import hashing, signing
    except ImportError as error:
        what = f"signing needs model-signing ({signature.reason(error)})"
        raise EnvironmentFault(what, fix=signature.PACKAGES) from None
    config = signing.Config()
    try:
        if key is None:
            config.use_sigstore_signer(use_ambient_credentials=True)
        else:
            config.use_elliptic_key_signer(private_key=key)
    except Exception as error:
        what = (
            f"cannot sign with this key: {signature.reason(error)}" if key else _NO_SIGSTORE + signature.reason(error)
        )
        raise EnvironmentFault(what, str(key or ""), _KEY_HINT) from error
    ours = [verify.SUMS, verify.SIGNATURE]
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=ours, ignore_git_paths=False))
    try:
        config.sign(folder, target)
    except ValueError as error:  # links and devices: the library refuses them as verify.py does
        raise ModelError(f"cannot be signed: {signature.reason(error)}", str(folder)) from error
    except Exception as error:
        if key is not None:
            raise
        raise EnvironmentFault(_NO_SIGSTORE + signature.reason(error), fix=_KEY_HINT) from error


def _signed(data: bytes) -> dict[str, str]:
    """What a signature that was just made covers: file → sha-256."""
    statement = json.loads(base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"]))
    return {item["name"]: item["digest"] for item in statement["predicate"]["resources"]}


def _put(path: Path, data: bytes) -> None:
    if len(data) > verify.LIMIT:
        what = f"{path.name} would be larger than the {verify.LIMIT // 1024**2} MiB that receivers read"
        raise ModelError(what, str(path.parent), "release fewer files")
    write_atomic(path, data)


def _unsuitable(names: Iterable[str]) -> list[str]:
    """Names that would not arrive as they are. Two spellings of one name are one file on many receivers' disks."""
    found, spellings = [], dict[str, str]()
    for name in [*sorted(verify.OURS), *names]:
        try:
            name.encode()
        except UnicodeEncodeError:
            found.append(f"the name {verify.shown(name)} is not UTF-8")
            continue
        if "\r" in name:
            found.append(f"the name {verify.shown(name)} has a carriage return, which sha256sum's versions read apart")
        for path in (name, *map(str, PurePosixPath(name).parents)):
            folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
            if spellings.setdefault(folded, path) != path:
                both = f"{verify.shown(path)} and {verify.shown(spellings[folded])}"
                found.append(f"{both} are one name where case or accents' encoding does not count")
    return list(dict.fromkeys(found))
