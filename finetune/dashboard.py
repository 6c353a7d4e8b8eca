"""The local dashboard: trackio on 127.0.0.1, over the runs of one folder."""

from __future__ import annotations

import contextlib
import io
import os
import time
from pathlib import Path

from finetune.devices import PROJECT, trackio_folder
from finetune.errors import EnvironmentFault
from finetune.terminal import Terminal


def show(runs: Path, port: int, terminal: Terminal) -> None:
    """Serve until Ctrl-C.

    Raises:
        EnvironmentFault: nothing was tracked below ``runs``.
    """
    folder = trackio_folder(runs)
    if not folder.is_dir():
        raise EnvironmentFault(
            "no tracked runs here", str(runs), "train with `tracker: trackio`, and name the folder that holds the runs"
        )
    # trackio reads its folder when it is imported, from the environment only.
    os.environ["TRACKIO_DIR"] = str(folder)
    import trackio

    # It prints a token that allows writing: not for a log, so its own lines are not shown.
    with contextlib.redirect_stdout(io.StringIO()):
        server = trackio.show(
            project=PROJECT, host="127.0.0.1", open_browser=False, block_thread=False, server_port=port or None
        )
    url = next(part for part in server if isinstance(part, str) and part.startswith("http"))
    terminal.say(f"dashboard of {runs}: {url.partition('?')[0]}   (Ctrl-C ends)")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
