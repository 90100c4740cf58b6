"""What a run survives: Ctrl-C, a kill at any moment, and a second process in the same folder. Toy model."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from toys import FAST, begin, ftnb, toy_model, wait_for_step, write_format

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    model, data = toy_model(folder / "model"), write_format("csv", folder)
    sets = [word for pair in FAST for word in ("--set", pair)]
    more = ["--set", "epochs=12", "--set", "evals_per_epoch=3", "--set", "early_stopping=0"]
    more += ["--set", "dtype=float32"]  # auto is measured, and may differ between two runs
    return folder, ["train", "--data", data, "--task", "classification", "--model", model, *sets, *more]


def adapter(folder):
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(job):
    folder, command = job
    done = ftnb(*command, "--out", "whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return adapter(folder / "whole")


def test_ctrl_c_saves_and_the_same_command_goes_on(job, whole):
    folder, command = job
    process = begin(*command, "--out", "stopped", cwd=folder)
    wait_for_step(folder / "stopped", 10, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "goes on" in said
    assert not (folder / "stopped" / "run.json").exists()
    again = ftnb(*command, "--out", "stopped", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert adapter(folder / "stopped") == whole


def killed_again_and_again(job, whole, out, steps):
    "One run, killed by signal at each of these updates and a random moment after it, then finished."
    folder, command = job
    draw, killed = random.Random(0), 0
    for step in steps:
        process = begin(*command, "--out", out, cwd=folder)
        wait_for_step(folder / out, step, process)
        time.sleep(draw.random() * 0.3)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    again = ftnb(*command, "--out", out, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert adapter(folder / out) == whole
    return killed


def test_a_kill_at_any_moment_costs_one_interval_and_no_bit(job, whole):
    assert killed_again_and_again(job, whole, "killed", (5, 17, 31)) >= 2


@pytest.mark.slow
def test_fifty_kills_at_random_moments(job, whole):
    draw, killed = random.Random(1), 0
    for lap in range(5):
        steps = sorted(draw.sample(range(2, 80), 10))
        killed += killed_again_and_again(job, whole, f"fifty-{lap}", steps)
    print(f"{killed} of 50 runs were killed before they were done; all 5 ended with the same adapter")
    assert killed >= 40


AT_A_STEP = """
import os, shutil, signal, sys
import safetensors.torch
import ftnb.checkpoint as checkpoint
count, number = 0, {number}
inside = False

def trap(original):
    def call(*args, **kwargs):
        global count
        count += inside
        if inside and count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call

save = checkpoint.WholeCheckpoints._save_checkpoint

def saving(self, model, trial):
    global inside
    inside = True
    try:
        return save(self, model, trial)
    finally:
        inside = False

checkpoint.WholeCheckpoints._save_checkpoint = saving
for where, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (checkpoint, "save_file"), (os, "unlink")):
    setattr(where, name, trap(getattr(where, name)))
from ftnb.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("number", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in range(5, 64, 4))])
def test_a_kill_inside_a_save_leaves_something_whole(job, whole, number):
    folder, command = job
    out = f"inside-{number}"
    words = [sys.executable, "-c", AT_A_STEP.format(number=number), *map(str, command), "--out", out]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    died = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr[-500:]
    again = ftnb(*command, "--out", out, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert adapter(folder / out) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="Linux sets the limit of another process")
def test_a_full_disk_keeps_the_last_good_checkpoint(job, whole):
    import resource

    from ftnb.checkpoint import checkpoints, faults

    folder, command = job
    process = begin(*command, "--out", "full", cwd=folder)
    wait_for_step(folder / "full", 10, process)
    kept = [p for p in checkpoints(folder / "full" / "checkpoints") if not faults(p)]
    resource.prlimit(
        process.pid, resource.RLIMIT_FSIZE, (2000, 2000)
    )  # every larger file fails to be written
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in said, said
    assert len(said.strip().splitlines()[-1]) < 300 and "ftnb: error" in said
    assert kept and any(not faults(p) for p in kept)
    again = ftnb(*command, "--out", "full", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert adapter(folder / "full") == whole


@pytest.mark.slow
def test_of_a_hundred_starts_one_in_ten_wins(job):
    folder, command = job
    won = []
    for wave in range(10):
        started = [begin(*command, "--out", f"wave-{wave}", cwd=folder) for _ in range(10)]
        codes = sorted((p.communicate(timeout=600)[1] and p.returncode) or p.returncode for p in started)
        won.append(codes.count(0))
        assert set(codes) <= {0, 2}
        assert (folder / f"wave-{wave}" / "run.json").exists()
    print(f"100 starts in 10 folders: {sum(won)} went through")
    assert min(won) >= 1


def test_other_threads_are_refused_on_resume_unless_forced(job):
    folder, command = job
    process = begin(*command, "--out", "moved", cwd=folder)
    wait_for_step(folder / "moved", 30, process)
    process.kill()
    process.wait()
    kept = json.loads((folder / "moved" / "surroundings.json").read_text("utf-8"))["now"]["threads"]
    other = {"OMP_NUM_THREADS": str(int(kept) + 1)}
    refused = ftnb(*command, "--out", "moved", cwd=folder, **other)
    assert refused.returncode == 2 and f"threads was {kept}, is {int(kept) + 1}" in refused.stderr, (
        refused.stderr
    )
    forced = ftnb(*command, "--out", "moved", "--force", cwd=folder, **other)
    assert forced.returncode == 0, forced.stderr
    changed = json.loads((folder / "moved" / "run.json").read_text("utf-8"))["changed"]
    assert changed == [{"threads": [kept, str(int(kept) + 1)]}]


def test_two_processes_do_not_share_a_folder(job):
    folder, command = job
    first = begin(*command, "--out", "shared", cwd=folder)
    wait_for_step(folder / "shared", 2, first)
    first.send_signal(signal.SIGSTOP)  # it holds the folder for as long as the second needs to start
    second = ftnb(*command, "--out", "shared", cwd=folder)
    fresh = ftnb(*command, "--out", "shared", "--fresh", cwd=folder)
    first.kill()
    first.wait()
    for refused in (second, fresh):
        assert refused.returncode == 2
        assert "being written by another process" in refused.stderr and "Traceback" not in refused.stderr
    assert (folder / "shared" / "recipe.json").exists()


def test_who_comes_too_late_removes_nothing_of_who_came_first(job, monkeypatch, capsys):
    import ftnb.train
    from ftnb.cli import main
    from ftnb.plan import InputError

    folder, command = job
    monkeypatch.chdir(folder)

    def late(*_, **__):  # between the look at the folder and the lock, another process began a run in it
        (folder / "late").mkdir()
        (folder / "late" / "recipe.json").write_text("{}", "utf-8")
        raise InputError("late is being written by another process")

    monkeypatch.setattr(ftnb.train, "train", late)
    assert main([*map(str, command), "--out", "late"]) == 2 and "another process" in capsys.readouterr().err
    assert (folder / "late" / "recipe.json").read_text("utf-8") == "{}"
