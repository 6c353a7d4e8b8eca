"""Runs of several processes, really launched: equal to one process, refused where a launcher lies, whole when killed.

``make test-kill`` kills more often (marker ``long``).
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune import launch
from finetune.errors import Interrupted
from tests import runs, tiny
from tests.faults.breaking import results_folder
from tests.faults.sweep import Sweep, Verdict, keep
from tests.runs import ENVIRONMENT, OUTPUT, finetune

QUICK = ("evaluate.metrics=[loss]", "train.micro_batch_tokens=128", "train.examples_per_step=12", "train.steps=8")
ONE = {"OMP_NUM_THREADS": "1"}
LONG = 3600


def command(*words: str, overrides: tuple[str, ...] = QUICK) -> list[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    return [sys.executable, "-P", "-m", "finetune", "train", "r.yaml", *sets, *words]


def launched(*words: str, overrides: tuple[str, ...] = QUICK, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as somebody types it."""
    return subprocess.run(
        command(*words, overrides=overrides), env=ENVIRONMENT | ONE | more, capture_output=True, text=True, timeout=280
    )


def adapter(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A workplace with the run as one process (runs/alone) and as two (runs/one)."""
    folder = tmp_path_factory.mktemp("launched") / "work"
    runs.furnish(folder)
    shutil.copytree(tiny_base, folder / "base")
    with contextlib.chdir(folder):
        alone = launched(overrides=(*QUICK, "output=runs/alone"))
        assert alone.returncode == 0, alone.stderr
        two = launched("--processes", "2")
        assert two.returncode == 0, two.stderr
        (folder / "said").write_text(two.stdout)
    return folder


@pytest.fixture
def place(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it without the run of two, as the working folder."""
    shutil.copytree(unbroken, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / OUTPUT)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_two_processes_train_what_one_does(unbroken: Path) -> None:
    one, two = unbroken / "runs/alone", unbroken / OUTPUT
    assert tiny.distance(tiny.flat(adapter(two)), tiny.flat(adapter(one))) < 1e-5
    for line, other in zip(runs.curve(two), runs.curve(one), strict=True):
        assert line[4:] == other[4:], "the same samples, all of them"
        assert line[1] == pytest.approx(other[1], rel=1e-5)
    assert json.loads((two / "identity.json").read_text())["environment"]["processes"] == 2
    said = (unbroken / "said").read_text()
    assert said.startswith("launching: torchrun --nnodes=1 --nproc-per-node=2 --master-addr=127.0.0.1")
    assert "2 processes share each step's micro-batches" in said
    assert said.count("step 8/8") == 1, "one process speaks"
    assert not list(unbroken.rglob("*.tmp-*"))


def test_another_number_of_processes_goes_on_and_says_so(unbroken: Path, place: Path) -> None:
    paused = launched("--processes", "2", "--until", "4")
    assert paused.returncode == 0, paused.stderr
    said = launched()
    assert said.returncode == 0, said.stderr
    assert "processes was 2 and is 1 now: the run goes on, but its bits will differ" in said.stdout
    assert "going on after step 4" in said.stdout
    assert tiny.distance(tiny.flat(adapter(OUTPUT)), tiny.flat(adapter(unbroken / OUTPUT))) < 1e-5
    assert [line[4:] for line in runs.curve()] == [line[4:] for line in runs.curve(unbroken / OUTPUT)]


# ---- the three ways in which launchers fail silently


def test_a_launcher_that_starts_one_process_instead_of_two_is_found_out(place: Path) -> None:
    """accelerate with MULTI_CPU and two processes starts one, and says nothing."""
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "num_processes": 2,
              "num_machines": 1, "machine_rank": 0, "use_cpu": True, "mixed_precision": "no"}  # fmt: skip
    Path("accelerate.yaml").write_text(json.dumps(config))
    said = launched("--processes", "2", "--launch", "accelerate", "--launch-config", "accelerate.yaml")
    assert said.returncode == 5, said.stderr
    assert "2 processes were asked for, and the launcher has started 1" in said.stderr
    assert "Traceback" not in said.stderr
    assert not OUTPUT.exists()


def test_a_launcher_set_up_for_fsdp_is_found_out(place: Path) -> None:
    """accelerate with FSDP on CPUs starts two whole replicas, and says nothing."""
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_processes": 2,
              "num_machines": 1, "machine_rank": 0, "mixed_precision": "no",
              "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True}}  # fmt: skip
    Path("accelerate.yaml").write_text(json.dumps(config))
    said = launched("--processes", "2", "--launch", "accelerate", "--launch-config", "accelerate.yaml")
    assert said.returncode == 5, said.stderr
    assert "the launcher is set up for FSDP, and every process here holds the whole model" in said.stderr
    assert "Traceback" not in said.stderr
    assert not OUTPUT.exists()


def test_processes_that_nobody_called_one_job_are_found_out(place: Path) -> None:
    """Two runs that know nothing of one another, in one folder."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "finetune",
    ]
    words = ["train", "r.yaml"]
    done = subprocess.run([*torchrun, *words], env=ENVIRONMENT | ONE, capture_output=True, text=True, timeout=280)
    assert done.returncode != 0
    assert "2 processes were launched, and nothing says that they are one job; add --world 2" in done.stderr
    assert not OUTPUT.exists()


def test_accelerate_launches_two_as_torchrun_does(unbroken: Path, place: Path) -> None:
    said = launched("--processes", "2", "--launch", "accelerate")
    assert said.returncode == 0, said.stderr
    assert runs.adapter_digest() == runs.adapter_digest(unbroken / OUTPUT)


# ---- killed and stopped


@contextlib.contextmanager
def running(*words: str, overrides: tuple[str, ...] = QUICK) -> Iterator[subprocess.Popen[str]]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(*words, overrides=overrides), env=ENVIRONMENT | ONE, **pipes) as job:
        try:
            yield job
        finally:
            if job.poll() is None:
                job.terminate()


def workers(job: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The job's processes by rank."""
    found = {}
    for child in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error, KeyError, ValueError):
            found[int(child.environ()["RANK"])] = child
    return found


def wait_for_step(job: subprocess.Popen[str], step: int) -> None:
    until = time.monotonic() + 200
    while not (OUTPUT / "metrics.jsonl").exists() or len((OUTPUT / "metrics.jsonl").read_bytes().splitlines()) < step:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


SLOW = (*QUICK[:2], "train.examples_per_step=20", "train.steps=60", "train.save_every=7")


@pytest.fixture(scope="module")
def slow(unbroken: Path) -> str:
    """The digest of an unbroken run of two that lasts long enough to be killed."""
    with contextlib.chdir(unbroken):
        done = launched("--processes", "2", overrides=(*SLOW, "output=runs/slow"))
        assert done.returncode == 0, done.stderr
        return runs.adapter_digest(Path("runs/slow"))


def killed(rank: int, after: int, overrides: tuple[str, ...] = SLOW) -> None:
    """Kill that process after so many steps of the run; the job ends with code 6 and one message, its state whole."""
    with running("--processes", "2", overrides=overrides) as job:
        wait_for_step(job, after)
        workers(job)[rank].kill()
        _, err = job.communicate(timeout=100)
    assert job.returncode == 6, err
    assert "Traceback" not in err
    assert "goes on from" in err
    assert not (OUTPUT / "finished.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_is_killed_and_the_same_command_ends_with_the_same_bits(place: Path, slow: str, rank: int) -> None:
    killed(rank, after=random.Random(rank).randrange(1, 25))
    kept = sorted(int(path.name[5:]) for path in (OUTPUT / "checkpoints").glob("step-*"))
    done = launched("--processes", "2", overrides=SLOW)
    assert done.returncode == 0, done.stderr
    assert f"going on after step {kept[-1]}" in done.stdout
    if rank:
        assert kept[-1] % 7 or kept[-1] == 0, "the first process saved what was done when the other was lost"
    assert runs.adapter_digest() == slow


@pytest.mark.long
@pytest.mark.timeout(LONG)
@pytest.mark.parametrize(("seed", "shard"), [(5, "none"), (6, "none"), (7, "none"), (8, "fsdp"), (9, "fsdp")])
def test_processes_are_killed_again_and_again(
    place: Path, slow: str, seed: int, shard: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw, began = random.Random(seed), time.monotonic()
    overrides = (*SLOW, f"train.shard={shard}")
    found: list[Verdict] = []
    while len(found) < 8:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(OUTPUT)
        kills = []
        for _ in range(draw.choice((1, 1, 2))):  # some are killed again after they went on
            rank, after = draw.randrange(2), len(_lines()) + draw.randrange(1, 25)
            kills.append((f"seed {seed}: process {rank} after step {after}", _killed(rank, after, overrides)))
        done = launched("--processes", "2", overrides=overrides)
        same = done.returncode == 0 and runs.adapter_digest() == slow
        wrong = "" if same else f"the same command ended with {done.returncode}, or other bits: {done.stderr[-300:]}"
        found += [Verdict(point, not why, same, why or wrong) for point, why in kills]
    folder = results_folder(tmp_path_factory.mktemp("results"))
    swept = Sweep(found, time.monotonic() - began)
    print("\n" + keep(folder, f"one of two processes killed, shard {shard}, seed {seed}", swept))
    assert swept.faults == []


def _killed(rank: int, after: int, overrides: tuple[str, ...]) -> str:
    """What was wrong when that process was killed; empty where the job ended as it must."""
    try:
        killed(rank, after, overrides)
    except AssertionError as error:
        return str(error)[:2000]
    return ""


def _lines() -> list[bytes]:
    path = OUTPUT / "metrics.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


@pytest.mark.parametrize("rank", [None, 1], ids=["the command", "one process of it"])
def test_sigterm_saves_and_ends_with_code_6(place: Path, slow: str, rank: int | None) -> None:
    with running("--processes", "2", overrides=SLOW) as job:
        wait_for_step(job, 5)
        (job if rank is None else workers(job)[rank]).send_signal(signal.SIGTERM)
        _, err = job.communicate(timeout=100)
    assert job.returncode == 6, err
    found = re.search(r"stopped on request; step (\d+) of 60 is saved in runs/one", err)
    assert found, err
    assert "Traceback" not in err
    assert launched("--processes", "2", overrides=SLOW).returncode == 0
    assert runs.adapter_digest() == slow


# ---- without processes


def test_a_dry_run_prints_the_command(work: Path) -> None:
    said = finetune("train", "r.yaml", "--processes", "4", "--until", "3", "--set", "train.steps=9", "--dry-run")
    assert said.out == (
        "torchrun --nnodes=1 --nproc-per-node=4 --master-addr=127.0.0.1 --master-port=29500 --max-restarts=0 "
        "--shutdown-timeout=120 -m finetune train r.yaml --set train.steps=9 --until 3 --world 4\n"
    )
    assert finetune("train", "r.yaml", "--launch", "accelerate", "--processes", "2", "--dry-run").out.startswith(
        "accelerate launch --multi_gpu --num_machines=1 --num_processes=2"
    )
    assert not OUTPUT.exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--launch", "local", "--processes", "2"], 2, "local is one process"),
        (["--launch", "torchrun", "--world", "2"], 5, "2 processes were asked for, and the launcher has started 1"),
        (["--dry-run"], 2, "nothing is launched"),
        (["--processes", "0"], 2, "--processes"),
        (["--launch", "mpi"], 2, "--launch"),
        (["--processes", "2", "--set", "train.stepz=3"], 2, "did you mean 'steps'?"),
        (["--processes", "2", "--set", "data.train_path=gone.jsonl"], 2, "gone.jsonl"),
    ],
)
def test_what_cannot_be_launched_is_told_at_once(work: Path, words: list[str], code: int, said: str) -> None:
    answer = finetune("train", "r.yaml", *words)
    assert answer.code == code
    assert said in answer.err
    assert not OUTPUT.exists()


def test_the_codes_of_a_job() -> None:
    assert launch.verdict({}) == 0
    assert launch.verdict({0: 6, 1: 6}) == 6
    assert launch.verdict({0: 6, 1: 4}) == 4
    assert launch.verdict({0: -15, 1: 5}) == 5
    assert launch.verdict({0: 6, 1: -9}) == 6
    with pytest.raises(Interrupted, match=r"process 1 of the job was killed \(signal 9\)"):
        launch.verdict({1: -9})


def test_slurm_runs_the_tasks_of_a_job(unbroken: Path, place: Path) -> None:
    pytest.importorskip("submitit")
    said = launched("--processes", "2", "--launch", "slurm", "--job", "cluster=local", "--job", "timeout_min=10",
                    XDG_CACHE_HOME=str(place / "cache"))  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "job " in said.stdout
    assert runs.adapter_digest() == runs.adapter_digest(unbroken / OUTPUT)


def test_slurm_without_submitit_names_the_extra(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    said = finetune("train", "r.yaml", "--processes", "2", "--launch", "slurm")
    assert said.code == 5
    assert 'pip install "finetune-qwen[slurm]"' in said.err
