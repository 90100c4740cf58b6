"""A sweep from the command line: killed in the middle it goes on, and it never looks at the test rows. Toy model."""

import json
import os
import signal
import subprocess
import sys
import time

import optuna
import pytest

from conftest import ROOT
from ftnb.plan import Recipe
from toys import FAST, ftnb, rows, toy_model

SETS = [word for pair in FAST for word in ("--set", pair)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    toy_model(folder / "model")
    text = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows(90))
    (folder / "toy.csv").write_text(text, "utf-8")
    return folder


def words(folder, grid):
    start = ["sweep", "--data", "toy.csv", "--task", "classification", "--model", folder / "model", *SETS]
    more = ["--set", "dtype=float32", "--grid", grid, "--rows", "40", "--answers", "6", "--out", "found"]
    return [str(word) for word in (*start, *more, "--save", "best.toml")]


def test_killed_in_the_middle_it_goes_on(folder):
    asked, kept = words(folder, "learning_rate=1e-4,1e-3,1e-2"), folder / "found" / "trials.jsonl"
    code = "import sys; from ftnb.cli import main; sys.exit(main())"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        [sys.executable, "-c", code, *asked], cwd=folder, env=env, stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 240
    while not kept.exists() and first.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    assert 1 <= len(before) < 4, "it was not killed in the middle"
    done = ftnb(*asked, cwd=folder)
    assert done.returncode == 0, done.stderr
    after = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    assert after[: len(before)] == before
    assert [t["settings"]["learning_rate"] for t in after] == [2e-4, 1e-4, 1e-3, 1e-2]  # its own first
    assert "recommended: learning_rate" in done.stdout and (folder / "found/sweep.png").stat().st_size > 5000
    assert Recipe.load(folder / "best.toml").learning_rate in (2e-4, 1e-4, 1e-3, 1e-2)
    assert not list((folder / "found/trials").rglob("*.safetensors")), "checkpoints of trials are left behind"
    log = optuna.storages.journal.JournalFileBackend(str(folder / "found/study.log"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(log))
    for setting in (0, 1):  # a kill while one trial runs and another waits
        study.enqueue_trial({"setting": setting})
    study.ask()
    (folder / "found/study.log.lock").symlink_to("found/study.log")  # what a kill inside Optuna leaves
    assert ftnb(*asked, cwd=folder, timeout=120).stdout == done.stdout


def test_bad_grids_are_refused_before_anything_is_written(folder):
    for grid, said in (
        ("learning_rat=1", "did you mean learning_rate"),
        ("r=0", "r must be"),
        ("", "at least one"),
    ):
        done = ftnb(*words(folder, grid)[:-3], "nothing", cwd=folder)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert not (folder / "nothing").exists()
