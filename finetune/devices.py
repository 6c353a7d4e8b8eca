"""Plan → accelerate: the device, and the trackers. The only file that knows them.

Of several processes the first one alone has trackers; how they share a step is in ``peers``.
"""

from __future__ import annotations

import contextlib
import io
import netrc
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune.errors import EnvironmentFault
from finetune.recipe.paths import TRACKIO

_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}
PROJECT = "finetune"


@dataclass(frozen=True)
class Session:
    """An accelerator and whether it logs anywhere besides the run folder's own metrics file."""

    accelerator: Any
    tracker: str
    prefix: str = ""
    """Stands before every name that is logged: several adapters share one tracked run."""

    @property
    def tracking(self) -> bool:
        return self.tracker != "none"

    def log(self, values: dict[str, float], step: int) -> None:
        if self.tracking:
            self.accelerator.log({f"{self.prefix}{name}": value for name, value in values.items()}, step=step)

    def finish(self) -> None:
        if self.tracking:
            with contextlib.redirect_stdout(io.StringIO()):
                self.accelerator.end_training()
                if self.tracker == "trackio":
                    # accelerate ends the run but leaves it current: trackio would end it again at exit, and say so.
                    import trackio

                    trackio.finish()


def start(tracker: str, folder: Path, run_name: str, config: dict[str, Any], device: str) -> Session:
    """Start accelerate and the recipe's tracker.

    Raises:
        EnvironmentFault: the tracker's package is missing.
    """
    refuse_unusable(tracker, f"tracker: {tracker}")
    _place(tracker, folder)
    from accelerate import Accelerator

    names = [] if tracker == "none" else [tracker]
    accelerator = Accelerator(cpu=device == "cpu", log_with=names or None, project_dir=str(folder / "trackers"))
    if names:
        # trackio greets on standard output with advice that `finetune dashboard` replaces.
        with contextlib.redirect_stdout(io.StringIO()) if tracker == "trackio" else contextlib.nullcontext():
            settings = {tracker: _settings(tracker, folder, run_name)}
            with _wandb_faults() if tracker == "wandb" else contextlib.nullcontext():
                accelerator.init_trackers(PROJECT, config=config, init_kwargs=settings)
    return Session(accelerator, tracker)


def refuse_unusable(tracker: str, where: str) -> None:
    """Raise EnvironmentFault where the tracker's package is not installed, or its variables ask for what cannot be."""
    if tracker in _PACKAGES and find_spec(_PACKAGES[tracker]) is None:
        what, fix = f"the package {_PACKAGES[tracker]} is not installed", f'pip install "finetune-qwen[{tracker}]"'
        raise EnvironmentFault(what, where, fix)
    if tracker == "wandb":
        wandb_mode(where)


def _place(tracker: str, folder: Path) -> None:
    """Keep every tracker's files beside the runs, and what it would tell its makers here.

    These libraries take both from the environment only.
    """
    if tracker == "trackio":
        place_trackio(trackio_folder(folder.parent))
    elif tracker == "wandb":
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # its own errors and timings, sent even of a run kept offline
        if os.environ.get("WANDB_MODE") == "":
            del os.environ["WANDB_MODE"]  # it takes an empty one for a wrong one
    elif tracker == "mlflow":
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{(folder.parent / 'mlflow.db').absolute()}")


def place_trackio(place: Path) -> None:
    """Let trackio keep its files here. It reads that when it is imported: one that was, for another place, is dropped,
    else a second run in this process would be recorded beside the first one."""
    if os.environ.get("TRACKIO_DIR") == str(place):
        return
    os.environ["TRACKIO_DIR"] = str(place)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]


def trackio_folder(runs: Path) -> Path:
    return runs.absolute() / TRACKIO


def _settings(tracker: str, folder: Path, run_name: str) -> dict[str, Any]:
    if tracker == "trackio":
        return {"name": run_name, "resume": "allow", "embed": False}
    if tracker == "wandb":
        settings = {"name": run_name, "id": _wandb_id(folder), "resume": "allow"}
        return settings | {"mode": wandb_mode(f"tracker: {tracker}"), "dir": str(folder)}
    return {}


def _wandb_id(folder: Path) -> str:
    """The id under which the run was begun, or a new one: two runs of one name must not become one on the server."""
    begun = sorted(path.name.split("run-", 1)[1].partition("-")[2] for path in (folder / "wandb").glob("*run-*-*"))
    return begun[0] if begun else f"{folder.name[:60]}-{secrets.token_hex(4)}"


def wandb_mode(where: str) -> str:
    """online, offline or disabled: as WANDB_MODE says; without it online where there is a key.

    Raises:
        EnvironmentFault: WANDB_MODE asks for what cannot be.
    """
    wanted = os.environ.get("WANDB_MODE", "")
    mode = {"dryrun": "offline", "run": "online"}.get(wanted, wanted)
    if mode in ("offline", "disabled"):
        return mode
    if mode not in ("", "online"):
        raise EnvironmentFault(f"WANDB_MODE is {wanted!r}", where, "make it online, offline or disabled, or unset it")
    if mode == "online" and not wandb_key():
        raise EnvironmentFault(
            "WANDB_MODE is online, and there is no key", where, "set WANDB_API_KEY, or unset WANDB_MODE"
        )
    return "online" if wandb_key() else "offline"


def remarks(tracker: str, folder: Path) -> list[str]:
    """What is to be known of the tracker before a run whose files go to ``folder`` begins.

    Raises: as ``wandb_mode``.
    """
    if tracker != "wandb":
        return []
    mode = wandb_mode(f"tracker: {tracker}")
    if mode == "disabled":
        return ["tracker: wandb is disabled by WANDB_MODE: it records nothing, metrics.jsonl does"]
    if mode == "online":
        return [f"tracker: wandb, online: recipe and numbers go to {wandb_host()} while the run trains"]
    why = "as WANDB_MODE says" if os.environ.get("WANDB_MODE") else "no key was found"
    later = f"to upload later: wandb sync {folder}/wandb/offline-run-*"
    return [f"tracker: wandb, offline ({why}); {later}{'' if wandb_key() else '; or set WANDB_API_KEY'}"]


def wandb_host() -> str:
    return urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or "api.wandb.ai"


def wandb_key() -> bool:
    """Whether wandb would find a key: in the environment, or stored by its own login."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    stored = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(stored).authenticators(wandb_host()) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextlib.contextmanager
def _wandb_faults() -> Iterator[None]:
    """A key or variable that it refuses, or a server that is not reached, in one message: nothing has been loaded."""
    from wandb.errors import Error

    try:
        yield
    except (Error, ValueError) as error:
        fix = "mend that, or record without a network: WANDB_MODE=offline"
        raise EnvironmentFault(f"wandb cannot begin: {str(error) or type(error).__name__}", wandb_host(), fix) from None
