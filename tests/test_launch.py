"""Runs of several processes, really launched: equal to one process, refused where a launcher lies, whole when killed.

``make test-kill`` kills more often (marker ``long``).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
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
FSDP: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_processes": 2, "num_machines": 1,
    "machine_rank": 0, "mixed_precision": "no",
    "fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": True},
}  # fmt: skip
ONE = {"OMP_NUM_THREADS": "1"}
LONG = 3600


def command(*words: str, overrides: tuple[str, ...] = QUICK) -> list[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    return ["train", "r.yaml", *sets, *words]


@dataclass(frozen=True)
class Launched:
    """How a job ended, and what its launcher and its processes said."""

    code: int
    out: str
    err: str


def launched(*words: str, overrides: tuple[str, ...] = QUICK, **more: str) -> Launched:
    """The command in this process, which has the libraries loaded; what it launches are processes as ever."""
    with own_process_state(ENVIRONMENT | ONE | more), contextlib.ExitStack() as kept:
        told = {fd: kept.enter_context(tempfile.TemporaryFile("w+")) for fd in (1, 2)}
        with contextlib.ExitStack() as redirected:
            for fd, file in told.items():
                redirected.callback(os.close, former := os.dup(fd))
                redirected.callback(os.dup2, former, fd)
                os.dup2(file.fileno(), fd)
            said = finetune(*command(*words, overrides=overrides))
        for file in told.values():
            file.seek(0)
        return Launched(said.code, said.out + told[1].read(), said.err + told[2].read())


@contextlib.contextmanager
def own_process_state(environment: dict[str, str]) -> Iterator[None]:
    """What a launcher changes in its process is as before afterwards: variables, signals."""
    variables = dict(os.environ)
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    signals[signal.SIGQUIT] = signal.getsignal(signal.SIGQUIT)
    os.environ.update(environment)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        for number, handler in signals.items():
            signal.signal(number, handler)


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
        alone = runs.train(*QUICK, "output=runs/alone")
        assert alone.code == 0, alone.err
        two = launched("--processes", "2")
        assert two.code == 0, two.err
        (folder / "said").write_text(two.out)
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
    shutil.copytree(unbroken / OUTPUT, OUTPUT)
    for later in ("finished.json", "adapter", "checkpoints/step-00000008"):  # as if it had been killed after step 6
        runs_path = OUTPUT / later
        shutil.rmtree(runs_path) if runs_path.is_dir() else runs_path.unlink()
    said = runs.train(*QUICK)
    assert said.code == 0, said.err
    assert "processes was 2 and is 1 now: the run goes on, but its bits will differ" in said.out
    assert "going on after step 6" in said.out
    assert tiny.distance(tiny.flat(adapter(OUTPUT)), tiny.flat(adapter(unbroken / OUTPUT))) < 1e-5
    assert [line[4:] for line in runs.curve()] == [line[4:] for line in runs.curve(unbroken / OUTPUT)]


def test_a_start_that_looks_at_rows_is_made_by_one_process_for_all(place: Path) -> None:
    start = (*QUICK, "adapter.init_lora_weights=pissa")
    said = runs.train(*start, options=["--processes", "2"])
    assert said.code == 5
    assert "pissa is made by one process, for all; take one process to step 1 (--until 1)" in said.err
    one = runs.train(*start, options=["--until", "1"])
    assert one.code == 0, one.err
    assert launched("--processes", "2", overrides=start).code == 0
    whole = runs.train(*start, "output=runs/whole")
    assert whole.code == 0, whole.err
    assert tiny.distance(tiny.flat(adapter(OUTPUT)), tiny.flat(adapter(Path("runs/whole")))) < 1e-5


# ---- the three ways in which launchers fail silently


def test_a_launcher_that_starts_one_process_instead_of_two_is_found_out(place: Path) -> None:
    """accelerate with MULTI_CPU and two processes starts one, and says nothing."""
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "num_processes": 2,
              "num_machines": 1, "machine_rank": 0, "use_cpu": True, "mixed_precision": "no"}  # fmt: skip
    Path("accelerate.yaml").write_text(json.dumps(config))
    said = launched("--processes", "2", "--launch", "accelerate", "--launch-config", "accelerate.yaml")
    assert said.code == 5, said.err
    assert "2 processes were asked for, and the launcher has started 1" in said.err
    assert "Traceback" not in said.err
    assert not OUTPUT.exists()


def test_a_launcher_set_up_for_fsdp_is_found_out(place: Path) -> None:
    """accelerate with FSDP on CPUs starts two whole replicas, and says nothing."""
    Path("accelerate.yaml").write_text(json.dumps(FSDP))
    said = launched("--processes", "2", "--launch", "accelerate", "--launch-config", "accelerate.yaml")
    assert said.code == 5, said.err
    assert "the launcher is set up for FSDP, and every process here holds the whole model" in said.err
    assert "Traceback" not in said.err
    assert not OUTPUT.exists()


def test_processes_that_nobody_called_one_job_are_found_out(place: Path) -> None:
    """Two runs that know nothing of one another, in one folder."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "finetune"]
    done = subprocess.run(
        [sys.executable, *torchrun, "train", "r.yaml"], env=ENVIRONMENT | ONE, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode != 0
    assert "2 processes were launched, and nothing says that they are one job; add --world 2" in done.stderr
    assert not OUTPUT.exists()


@pytest.mark.parametrize("text", ['{"zero_optimization": {"stage": 3}}', "distributed_type: DEEPSPEED\n"])
def test_settings_of_deepspeed_are_refused_before_anything_starts(place: Path, text: str) -> None:
    Path("accelerate.yaml").write_text(text)
    said = launched("--processes", "2", "--launch", "accelerate", "--launch-config", "accelerate.yaml", "--dry-run")
    assert said.code == 5
    assert "these settings are for DeepSpeed" in said.err


def test_accelerate_launches_two_as_torchrun_does(unbroken: Path, place: Path) -> None:
    said = launched("--processes", "2", "--launch", "accelerate")
    assert said.code == 0, said.err
    assert runs.adapter_digest() == runs.adapter_digest(unbroken / OUTPUT)


def test_shards_under_accelerates_fsdp_2_have_the_bits_of_whole_bases(unbroken: Path, place: Path) -> None:
    Path("accelerate.yaml").write_text(json.dumps(FSDP))
    shards = (*QUICK, "train.shard=fsdp")
    said = launched("--processes", "2", "--launch", "accelerate", "--launch-config", "accelerate.yaml",
                    overrides=shards)  # fmt: skip
    assert said.code == 0, said.err
    assert "each of 2 processes holds 19.5 kB, its part of the decoder layers" in said.out
    assert runs.adapter_digest() == runs.adapter_digest(unbroken / OUTPUT)
    assert runs.curve() == runs.curve(unbroken / OUTPUT)


def test_one_process_has_no_shards(place: Path) -> None:
    said = runs.train("train.shard=fsdp")
    assert said.code == 2
    assert "fsdp parts the base among several processes, and this is one; add --processes N" in said.err
    assert not OUTPUT.exists()


# ---- killed and stopped


@contextlib.contextmanager
def running(overrides: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
    """The command with two processes, in a process of its own, as somebody types it."""
    words = [sys.executable, "-P", "-m", "finetune", *command("--processes", "2", overrides=overrides)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=ENVIRONMENT | ONE, **pipes) as job:
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
        assert done.code == 0, done.err
        return runs.adapter_digest(Path("runs/slow"))


def killed(rank: int, after: int, overrides: tuple[str, ...] = SLOW) -> None:
    """Kill that process after so many steps of the run; the job ends with code 6 and one message, its state whole."""
    with running(overrides) as job:
        wait_for_step(job, after)
        workers(job)[rank].kill()
        _, err = job.communicate(timeout=100)
    assert job.returncode == 6, err
    assert "Traceback" not in err
    assert "goes on from" in err
    assert not (OUTPUT / "finished.json").exists()


def asked_to_stop(rank: int | None, after: int, overrides: tuple[str, ...]) -> None:
    """SIGTERM for the command, or for one process of it: saved, and code 6."""
    with running(overrides) as job:
        wait_for_step(job, after)
        (job if rank is None else workers(job)[rank]).send_signal(signal.SIGTERM)
        _, err = job.communicate(timeout=100)
    assert job.returncode == 6, err
    assert re.search(r"stopped on request; step (\d+) of 60 is saved in runs/one", err), err
    assert "Traceback" not in err


def kept() -> int:
    """The step of the newest checkpoint."""
    return max(int(path.name[5:]) for path in (OUTPUT / "checkpoints").glob("step-*"))


def test_a_job_is_killed_and_stopped_and_ends_with_the_same_bits(place: Path, slow: str) -> None:
    killed(1, after=3)
    assert kept() == len(_lines()), "the first process saved what was done when the other was lost"
    asked_to_stop(None, after=len(_lines()) + 3, overrides=SLOW)
    killed(0, after=len(_lines()) + 3)
    asked_to_stop(1, after=len(_lines()) + 3, overrides=SLOW)
    stands = kept()
    done = launched("--processes", "2", overrides=SLOW)
    assert done.code == 0, done.err
    assert f"going on after step {stands}" in done.out
    assert runs.adapter_digest() == slow


def test_a_job_in_shards_is_killed_and_stopped_and_ends_with_the_bits_of_whole_bases(place: Path, slow: str) -> None:
    shards = (*SLOW, "train.shard=fsdp")
    killed(1, after=3, overrides=shards)
    assert kept() == len(_lines())
    asked_to_stop(1, after=len(_lines()) + 3, overrides=shards)
    killed(0, after=len(_lines()) + 3, overrides=shards)
    done = launched("--processes", "2", overrides=SLOW)  # that each held its part is no part of the run
    assert done.code == 0, done.err
    assert runs.adapter_digest() == slow


@pytest.mark.long
@pytest.mark.timeout(LONG)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_processes_are_killed_again_and_again(
    place: Path, slow: str, seed: int, shard: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw, began = random.Random(seed), time.monotonic()
    overrides = (*SLOW, f"train.shard={shard}")
    found: list[Verdict] = []
    while len(found) < 5:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(OUTPUT)
        kills = []
        for _ in range(draw.choice((1, 1, 2))):  # some are killed again after they went on
            rank, after = draw.randrange(2), len(_lines()) + draw.randrange(1, 25)
            kills.append((f"seed {seed}: process {rank} after step {after}", _killed(rank, after, overrides)))
        done = launched("--processes", "2", overrides=overrides)
        same = done.code == 0 and runs.adapter_digest() == slow
        wrong = "" if same else f"the same command ended with {done.code}, or other bits: {done.err[-300:]}"
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


# ---- without processes


def test_a_dry_run_prints_the_command(work: Path) -> None:
    said = finetune("train", "r.yaml", "--processes", "4", "--until", "3", "--set", "train.steps=9", "--dry-run")
    assert said.out == (
        "torchrun --nnodes=1 --nproc-per-node=4 --master-addr=127.0.0.1 --master-port=29500 --max-restarts=0 "
        "--shutdown-timeout=120 -m finetune train r.yaml --set train.steps=9 --until 3 --world 4\n"
    )
    as_json = finetune("train", "r.yaml", "--processes", "4", "--dry-run", "--json").out
    assert json.loads(as_json)["command"][:3] == ["torchrun", "--nnodes=1", "--nproc-per-node=4"]
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
    said = launched("--processes", "2", "--launch", "slurm", "--job", "cluster=local", "--job", "timeout_min=10",
                    XDG_CACHE_HOME=str(place / "cache"))  # fmt: skip
    assert said.code == 0, said.err
    assert "job " in said.out
    assert runs.adapter_digest() == runs.adapter_digest(unbroken / OUTPUT)


def test_what_a_slurm_job_is_handed_is_a_list_of_words(place: Path) -> None:
    """And a folder that others can write into is refused: a job runs what lies in it."""
    jobs = place / "cache" / "finetune" / "jobs"
    (jobs / "one").mkdir(parents=True)
    (jobs / "one").chmod(0o777)
    with own_process_state({"XDG_CACHE_HOME": str(place / "cache")}):
        said = finetune("train", "r.yaml", "--processes", "2", "--launch", "slurm", "--job", "cluster=local")
    assert said.code == 5
    assert f"{jobs / 'one'}: others can write into this folder, and a job runs what lies in it" in said.err
    assert not list(jobs.rglob("*.pkl"))
    dry = finetune("train", "r.yaml", "--processes", "2", "--launch", "slurm", "--dry-run")
    assert dry.out == f"{sys.executable} -m finetune.jobtask train r.yaml --world 2\n"


def test_slurm_without_submitit_names_the_extra(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    said = finetune("train", "r.yaml", "--processes", "2", "--launch", "slurm")
    assert said.code == 5
    assert 'pip install "finetune-qwen[slurm]"' in said.err
