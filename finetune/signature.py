"""Who released this folder? Checks ``model.sig`` through model-signing (the extra ``sign``), offline with a key pair.

    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out private.pem    # stays with the owner
    openssl pkey -in private.pem -pubout -out public.pem                               # goes to receivers, not by DIR

Of curves it takes P-256, P-384 and P-521; a private key must not be encrypted when it signs. A receiver without this
package runs the command of model-signing itself, which judges all but SHA256SUMS:

    pip install model-signing pyopenssl
    model_signing verify key DIR --signature DIR/model.sig --public_key public.pem --no-ignore-git-paths

Through Sigstore, where there is a network: ``verify sigstore … --identity WHO --identity_provider ISSUER`` instead.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune import verify

PACKAGES = "pip install 'finetune-qwen[sign]', or model-signing and pyopenssl"


class CannotCheck(Exception):  # noqa: N818 — the machine's fault, not the release's
    """The signature cannot be judged here: a package, the key or the network is missing."""


def check_signature(folder: Path, key: Path) -> list[str]:
    """Is ``model.sig`` the signature over this folder by the owner of the public ``key``? What does not hold, else [].

    It covers the payload and manifest.json; ``verify.faults`` judges what is left. Both must be empty.

    Raises:
        CannotCheck: model-signing is not installed, or ``key`` is no public key that it can use.
    """
    return _faults(folder, lambda config: config.use_elliptic_key_verifier(public_key=key), str(key))


def check_sigstore(folder: Path, identity: str, issuer: str) -> list[str]:
    """As ``check_signature``, for a signature made through Sigstore by ``identity``, vouched for by ``issuer``.

    Raises:
        CannotCheck: model-signing is not installed, or Sigstore's roots of trust cannot be fetched.
    """
    who = {"identity": identity, "oidc_issuer": issuer}
    return _faults(folder, lambda config: config.use_sigstore_verifier(**who), "Sigstore")


def _faults(folder: Path, choose: Callable[[Any], Any], whose: str) -> list[str]:
    try:
        from model_signing import hashing, verifying
    except ImportError as error:
        raise CannotCheck(f"signatures need model-signing ({reason(error)}): {PACKAGES}") from None
    if verify.SIGNATURE not in verify.listing(folder)[0]:
        return [f"{verify.SIGNATURE} is missing: this release is not signed"]

    class Everything(hashing.Config):  # type: ignore[misc, unused-ignore]  # untyped where it is not installed
        def add_ignored_paths(self, **_: Any) -> None:
            """A signature may carry its own list of files to leave out; here it is not obeyed."""

    try:
        verifier = choose(verifying.Config())
    except Exception as error:
        raise CannotCheck(f"cannot check against {verify.shown(whose)}: {reason(error)}") from error
    aside = [verify.SUMS, verify.SIGNATURE, verify.NOTES]
    whole = Everything().set_ignored_paths(paths=aside, ignore_git_paths=False)
    try:
        verify.bounded(folder / verify.SIGNATURE)
        with contextlib.redirect_stdout(io.StringIO()):  # the library prints advice about old signatures
            verifier.set_hashing_config(whole).verify(folder.resolve(), folder.resolve() / verify.SIGNATURE)
    except Exception as error:  # noqa: BLE001 — whatever a damaged or hostile signature makes the library raise
        return [f"{verify.SIGNATURE} does not hold against {verify.shown(whose)}: {reason(error)}"]
    return []


def reason(error: Exception) -> str:
    """What an error says, on one line; the library's answer to a wrong signature says nothing."""
    return verify.shown(" ".join(str(error).split())) or "it was made by another key, or is damaged"
