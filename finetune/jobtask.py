"""One task of a Slurm job: ``python -m finetune.jobtask train …`` where submitit has started it.

Its place, in submitit's words, becomes torch's variables; then the command runs in this process, and its exit code is
kept as a line of text, for who waits for a job on this machine.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    import submitit

    from finetune import cli

    job = submitit.JobEnvironment()
    submitit.helpers.TorchDistributedEnvironment().export(
        set_cuda_visible_devices=False,
        overwrite=True,  # each process takes the card of its number on the machine
    )
    signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))  # Slurm's word before time is up
    sys.argv = ["finetune", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        (job.paths.folder / f"{job.job_id}_{job.global_rank}_code").write_text(f"{code}\n")
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
