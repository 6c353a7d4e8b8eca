"""llama.cpp's own converters and its runtime, each in a child process.

The converters are not on the package index by themselves: the source archive of llama-cpp-python carries them. It is
fetched once, held against its pinned digest, and only the files that a conversion reads are kept in the user's cache;
what lies there is held against a second pinned digest before every use. A llama.cpp checkout of the user's own, named
by the environment variable FINETUNE_LLAMA_CPP, goes first and is taken as it is.

The children get an environment of a few named variables: no tokens and no home folder, hubs switched off.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from filelock import FileLock

from finetune import manifest
from finetune.errors import EnvironmentFault, FinetuneError, ModelError
from finetune.runfolder import atomic_folder, clear_leftovers_of, disk_fault, make_folder, user_cache, write_synced
from finetune.terminal import clean, duration

VERSION = "0.3.36"
VARIABLE = "FINETUNE_LLAMA_CPP"
MODEL, ADAPTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
ARCHIVE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
FILES_SHA256 = "90491aa73262178b9820671438c34e9a918d91eb2e40abe6e851ef181ec488d6"
"""Over the kept files' names and digests, as ``files_digest`` has it."""
_ROOT = PurePosixPath(f"llama_cpp_python-{VERSION}/vendor/llama.cpp")
_KEPT = (MODEL, ADAPTER, "LICENSE", "conversion/*.py", "gguf-py/gguf/*.py")
_LARGEST = 4_000_000
_LAUNCH = (
    "import runpy, sys; folder, script, *rest = sys.argv[1:]; sys.path.insert(0, folder); sys.argv = [script, *rest]; "
    "runpy.run_path(script, run_name='__main__')"
)
_PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS", "LANG", "LC_ALL")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
Say = Callable[[str], None]


class Ended(NamedTuple):
    """How a child process ended: its exit status and what it wrote."""

    code: int
    out: str
    err: str

    def last(self, count: int = 3) -> str:
        """The last lines of its errors, on one line."""
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return clean(" / ".join(lines[-count:]), 600) or f"it ended with {self.code}"


def converters(say: Say) -> Path:
    """The folder with llama.cpp's converters: the user's own checkout, else the pinned ones, fetched at first use.

    Raises:
        EnvironmentFault: no converters in the named folder; nothing in the cache and no network; the disk refuses.
    """
    if named := os.environ.get(VARIABLE):
        missing = [name for name in (MODEL, ADAPTER) if not (Path(named) / name).is_file()]
        if missing:
            raise EnvironmentFault(
                f"no {missing[0]} in the folder that {VARIABLE} names", named, "name a llama.cpp checkout"
            )
        return Path(named).absolute()
    folder = user_cache() / f"llama.cpp-{VERSION}"
    if files_digest(folder) == FILES_SHA256:
        return folder
    make_folder(folder.parent)
    try:
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if files_digest(folder) != FILES_SHA256:
                _fill(folder, say)
    except OSError as error:
        raise disk_fault(error, folder) from error
    return folder


def files_digest(folder: Path) -> str:
    """One digest over every file below ``folder``; empty where there is none, or a link (which may lead anywhere)."""
    if not folder.is_dir() or any(path.is_symlink() for path in (folder, *folder.rglob("*"))):
        return ""
    entries = manifest.digests(folder)
    return manifest.digest_bytes("".join(f"{entries[name]}  {name}\n" for name in sorted(entries)).encode())


def _fill(folder: Path, say: Say) -> None:
    clear_leftovers_of(folder)
    with tempfile.TemporaryDirectory(prefix="finetune-llamacpp-") as scratch:
        archive = _download(Path(scratch), folder, say)
        with atomic_folder(folder) as temporary:
            _unpack(archive, temporary)
            if files_digest(temporary) != FILES_SHA256:
                raise EnvironmentFault(
                    "the archive of llama.cpp holds other files than expected", str(folder), _elsewhere()
                )


def _download(scratch: Path, folder: Path, say: Say) -> Path:
    """The archive, through pip and wherever it is set up to look; pip holds it against the digest before reading it."""
    wanted = scratch / "wanted.txt"
    write_synced(wanted, f"llama-cpp-python=={VERSION} --hash=sha256:{ARCHIVE_SHA256}\n".encode())
    command = [sys.executable, "-m", "pip", "download", "--require-hashes", "--no-deps", "--no-binary=llama-cpp-python"]
    command += [
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
        "-r",
        str(wanted),
        "-d",
        str(scratch),
    ]
    # What pip needs of the environment (proxies, its own settings, PIP_*) is the user's; other programs' keys are not.
    kept = {key: value for key, value in os.environ.items() if key.startswith("PIP_") or not _SECRET.search(key)}
    ended = run(command, kept, scratch, "fetching llama.cpp's converters (77 MB, once)", say)
    archives = sorted(scratch.glob("*.tar.gz"))
    if ended.code or len(archives) != 1:
        lines = [line for line in ended.err.splitlines() if line.startswith("ERROR")]
        reason = clean(lines[-1].removeprefix("ERROR: "), 300) if lines else ended.last(1)
        raise EnvironmentFault(f"llama.cpp's converters could not be fetched: {reason}", str(folder), _elsewhere())
    if manifest.digest(archives[0]) != ARCHIVE_SHA256:
        raise EnvironmentFault("the archive of llama.cpp has another digest than expected", str(folder), _elsewhere())
    return archives[0]


def _elsewhere() -> str:
    return f"get llama.cpp's source where there is a network, and set {VARIABLE} to its folder"


def _unpack(archive: Path, out: Path) -> None:
    """The files that a conversion reads, under names of our own: no path, link or device of the archive is followed."""
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                name = PurePosixPath(member.name)
                if not member.isreg() or member.size > _LARGEST or ".." in name.parts or _ROOT not in name.parents:
                    continue
                name = name.relative_to(_ROOT)
                # Both have as many parts: a star would match a longer path otherwise.
                if any(name.match(kept) and len(name.parts) == kept.count("/") + 1 for kept in _KEPT):
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    source = opened.extractfile(member)
                    write_synced(out / name, source.read() if source else b"")
    except (tarfile.TarError, EOFError) as error:
        raise EnvironmentFault(
            f"the archive of llama.cpp cannot be read: {error}", str(archive), _elsewhere()
        ) from None


def run(
    command: Sequence[str], env: Mapping[str, str], cwd: Path, what: str, say: Say, given: str = ""
) -> Ended:  # fmt: skip
    """A child process until it ends, with a line of progress each second; it is stopped where this process is."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as standard_input:
        standard_input.write(given.encode())
        standard_input.seek(0)
        began = time.monotonic()
        process = subprocess.Popen(command, env=dict(env), cwd=cwd, stdin=standard_input, stdout=out, stderr=err)
        try:
            while True:
                try:
                    code = process.wait(timeout=1)
                    break
                except subprocess.TimeoutExpired:
                    say(f"{what}: {duration(time.monotonic() - began)}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        out.seek(0)
        err.seek(0)
        return Ended(code, out.read().decode(errors="replace"), err.read().decode(errors="replace"))


def _environment(home: Path) -> dict[str, str]:
    """``home`` stands for the user's folders, so that no token file is found either."""
    kept = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
    return kept | _OFFLINE | {"HOME": str(home), "HF_HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}


def convert(script: str, folder: Path, out: Path, arguments: Sequence[str], say: Say) -> None:
    """Run a converter over ``folder``, in the folder of ``out``, which it writes.

    Raises:
        ModelError: the converter does not take this model; its last lines are in the message.
        EnvironmentFault: no converters, a package is missing, or the machine refuses.
    """
    home = converters(say)
    # Braces in a path are a pattern to the converter: it gets a bare name.
    command = [sys.executable, "-P", "-c", _LAUNCH, str(home), str(home / script), str(folder.absolute())]
    command += ["--outfile", out.name, *arguments]
    ended = run(command, _environment(out.parent), out.parent, "converting to GGUF", say)
    if ended.code or not out.is_file():
        raise _converter_fault(ended, folder, out)


def _converter_fault(ended: Ended, folder: Path, out: Path) -> FinetuneError:
    if "No space left on device" in ended.err:
        return disk_fault(OSError(errno.ENOSPC, "No space left on device"), out)
    if "pre-tokenizer was not recognized" in ended.err:
        what = "llama.cpp does not know this tokenizer: how it splits text is not among those that it was told of"
        fix = "tokens that were added to it may be why; else set " + VARIABLE + " to a newer llama.cpp"
        return ModelError(what, str(folder), fix)
    if found := re.search(r"No module named '([\w.]+)'", ended.err):
        what = f"llama.cpp's converter needs the package {found[1]}"
        return EnvironmentFault(what, str(folder), "pip install 'finetune-qwen[gguf]'")
    if ended.code < 0:
        what = f"llama.cpp's converter was killed by signal {-ended.code}"
        return EnvironmentFault(what, str(folder), "it may have run out of memory; free some and run again")
    return ModelError(f"llama.cpp's converter failed: {ended.last()}", str(folder), "see what it says")


def unusable() -> str:
    """Why llama-cpp-python cannot be used here; empty where it can. A wheel of another processor dies when loaded."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed"
    with tempfile.TemporaryDirectory(prefix="finetune-llamacpp-") as scratch:
        ended = _child({"verb": "probe"}, Path(scratch), "loading llama.cpp", lambda text: None)
    return f"llama-cpp-python does not load: {ended.last(1)}" if ended.code else ""


def ask(request: Mapping[str, Any], scratch: Path, what: str, say: Say) -> Any:
    """What the runtime answers, asked in a child process: it ends the whole process where it meets what it must not.

    ``request`` is one of
    ``{"verb": "quantise", "model", "out", "kind"}`` → nothing;
    ``{"verb": "tokens", "model", "texts", "ids"}`` → ``{"tokens": ids of each text, "ends": which of ``ids`` end a text
    there, "adds_bos"}``;
    ``{"verb": "greedy", "model", "adapter", "prompts", "count"}`` → the next ``count`` ids after each prompt's ids;
    ``{"verb": "logits", "model", "rows", "at", "out"}`` → nothing; the file ``out`` has the logits of ``rows`` of ids
    at the positions ``at``, counted through all rows, as fp32 [positions, vocabulary] in numpy's format.

    Raises:
        ModelError: it failed.
    """
    ended = _child(request, scratch, what, say)
    try:
        return json.loads(ended.out.splitlines()[-1])["answer"]
    except (ValueError, IndexError, KeyError, TypeError):
        if "No space left on device" in ended.err:
            raise disk_fault(OSError(errno.ENOSPC, ""), scratch) from None
        raise ModelError(
            f"llama.cpp failed: {ended.last()}", str(request.get("model", "")), "see what it says"
        ) from None


def _child(request: Mapping[str, Any], scratch: Path, what: str, say: Say) -> Ended:
    command = [sys.executable, "-P", "-m", "finetune.llamaruntime"]
    return run(command, _environment(scratch), scratch, what, say, json.dumps(request))
