"""What a run survives: Ctrl-C, a kill at any moment, and a second process in the same folder. Toy model."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from toys import FAST, ftnb, toy_model, write_format

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    model, data = toy_model(folder / "model"), write_format("csv", folder)
    sets = [word for pair in FAST for word in ("--set", pair)]
    more = ["--set", "epochs=12", "--set", "evals_per_epoch=3", "--set", "early_stopping=0"]
    return folder, ["train", "--data", data, "--task", "classification", "--model", model, *sets, *more]


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(job):
    folder, command = job
    done = ftnb(*command, "--out", "whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return adapter(folder / "whole")


def begin(command, out, cwd):
    code = "import sys; from ftnb.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, *map(str, command), "--out", out]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, **pipes)


def wait_for_step(folder, step, process):
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        history = folder / "history.jsonl"
        if history.exists() and f'"step": {step},' in history.read_text("utf-8"):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.stderr.read()[-500:]}")


def test_ctrl_c_saves_and_the_same_command_goes_on(job, whole):
    folder, command = job
    process = begin(command, "stopped", folder)
    wait_for_step(folder / "stopped", 10, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said and "goes on" in said
    assert not (folder / "stopped" / "run.json").exists()
    again = ftnb(*command, "--out", "stopped", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert adapter(folder / "stopped") == whole


def test_a_kill_at_any_moment_costs_one_interval_and_no_bit(job, whole):
    folder, command = job
    draw = random.Random(0)
    for step in (5, 17, 31):  # one run, killed three times
        process = begin(command, "killed", folder)
        wait_for_step(folder / "killed", step, process)
        time.sleep(draw.random() * 0.3)
        process.kill()
        process.wait()
    again = ftnb(*command, "--out", "killed", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert adapter(folder / "killed") == whole


def test_a_torn_checkpoint_is_passed_over(tmp_path):
    from ftnb.train import last_checkpoint

    for step, state in ((3, "{}"), (6, "{}"), (9, '{"global'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state, encoding="utf-8")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert last_checkpoint(tmp_path / "absent") is None


def test_two_processes_do_not_share_a_folder(job):
    folder, command = job
    first = begin(command, "shared", folder)
    wait_for_step(folder / "shared", 2, first)
    first.send_signal(signal.SIGSTOP)  # it holds the folder for as long as the second needs to start
    second = ftnb(*command, "--out", "shared", cwd=folder)
    first.kill()
    first.wait()
    assert second.returncode == 2
    assert "being written by another process" in second.stderr and "Traceback" not in second.stderr
