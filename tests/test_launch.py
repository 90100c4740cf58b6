"One run on two processes: the loss of one process, one voice, and no process left waiting. Toy model, gloo."

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from conftest import ROOT
from ftnb.launch import SHARED_BY, config_file, launch_command, launch_config, sky_task
from toys import FAST, begin, ftnb, toy_model, wait_for_step, write_format

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

JOB = """
import json, os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from ftnb.data import Record, Splits
from ftnb.plan import InputError, Recipe
from toys import rows

def job(**changes):
    made = [Record(f"r{{n}}", ({{"role": "user", "content": t}},), a, a) for n, (t, a) in enumerate(rows(72))]
    sizes = dict(batch_size=4, accumulation=2, epochs=2, evals_per_epoch=1, max_new_tokens=4, r=4, alpha=8)
    rest = dict(learning_rate=1e-2, dtype="float32", early_stopping=0, task="classification", model={model!r})
    return Recipe(**(sizes | rest | changes)), Splits(made[:43], made[43:61], made[61:])
"""

# 43 rows: five updates of 8 and one of 3, which leaves the second process without rows
TOGETHER = """
import signal
import ftnb.train as module
from ftnb.train import everyone, train
rank, said = everyone().process_index, {}

def tried(name, *args):
    try:
        said[name] = train(*args).metrics
    except (InputError, KeyboardInterrupt) as error:
        said[name] = [type(error).__name__, str(error), getattr(error, "everywhere", None)]

recipe, splits = job()
tried("two", recipe, splits, "two")
tried("other", recipe.replace(r=8), splits, "two")
tried("leak", recipe, Splits(splits.train + splits.test[:2], splits.val, splits.test), "leak")
tried("uneven", recipe.replace(batch_size=3, accumulation=3), splits, "uneven")

end = module.Evidence.on_step_end
def stop(self, args, state, control, **kwargs):
    if rank == 1 and state.global_step == 7:
        self.stop = signal.SIGTERM
    return end(self, args, state, control, **kwargs)
module.Evidence.on_step_end = stop
tried("cut", recipe, splits, "cut")
module.Evidence.on_step_end = end
if rank == 0:
    import shutil
    shutil.copytree("cut", "cut-for-one")
tried("cut again", recipe, splits, "cut")

loss = module.Trainer._own_loss
def broken(self, *args):
    value = loss(self, *args)
    return value * float("inf") if rank == 1 and self.state.global_step == 3 else value
module.Trainer._own_loss = broken
tried("infinite", recipe, splits, "infinite")
Path(f"{rank}.json").write_text(json.dumps(said))
"""


def begun(folder, name, code, model, kind="ddp", **options):
    "Two processes that run `code`, started by accelerate with the config of the package."
    text = JOB.format(root=str(ROOT), tests=str(ROOT / "tests"), model=str(model)) + code
    (folder / name).write_text(text)
    line = launch_command([], 2, kind=kind, threads=1).replace("-m ftnb.cli", name)
    words = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(line)[2:]]
    env = {**os.environ, "IN_TEST": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(words, cwd=folder, env=env, text=True, stderr=subprocess.PIPE, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    toy_model(folder / "model")
    write_format("csv", folder)
    return folder


@pytest.fixture(scope="module")
def one(place):
    space = {}
    exec(JOB.format(root=str(ROOT), tests=str(ROOT / "tests"), model=str(place / "model")), space)
    from ftnb.train import train

    recipe, splits = space["job"]()
    return train(recipe, splits, place / "one"), recipe, splits


@pytest.fixture(scope="module")
def two(place):
    process = begun(place, "together.py", TOGETHER, place / "model")
    _, told = process.communicate(timeout=500)
    assert process.returncode == 0, told[-2000:]
    return [json.loads((place / f"{n}.json").read_text()) for n in (0, 1)]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def furthest(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_two_processes_have_the_loss_of_one_at_every_update(place, one, two):
    from ftnb.train import read_jsonl

    first, second = one[0].history, read_jsonl(place / "two" / "history.jsonl")
    assert [h["step"] for h in first] == [h["step"] for h in second]
    for name, many in (("loss", 12), ("eval_loss", 2), ("grad_norm", 12)):
        pairs = [(a[name], b[name]) for a, b in zip(first, second, strict=True) if name in a]
        gap = max(abs(a - b) for a, b in pairs)
        print(f"{name}: {len(pairs)} values, largest difference {gap:.1e}")
        assert len(pairs) == many and gap <= 1e-4
    for name in ("tokens", "eval_match", "learning_rate"):
        assert [h.get(name) for h in first] == [h.get(name) for h in second]
    gap = furthest(weights(place / "one"), weights(place / "two"))
    print(f"adapter: largest difference {gap:.1e}")
    assert gap <= 1e-5


def test_what_two_processes_leave_is_a_run_like_any(place, two):
    from ftnb.diagnose import diagnose
    from ftnb.evaluate import predict
    from ftnb.train import Run, load_run

    run = Run.load(place / "two")
    assert run.metrics["steps"] == 12 and run.metrics["batch_size"] == 4
    assert len(predict(*load_run(run), list(run.splits.test), run.recipe)) == len(run.splits.test)
    assert diagnose(run) is not None
    assert not list((place / "two").rglob("*.tmp"))


def test_both_know_what_one_refused(place, two):
    a, b = two
    assert a == b
    assert a["other"] == [
        "InputError",
        "two holds another run (r was 4, is 8); choose another name or start fresh",
        True,
    ]
    assert a["leak"][0] == "InputError" and not (place / "leak" / "recipe.json").exists()
    assert "an update of 9 rows" in a["uneven"][1]


def test_a_batch_that_is_no_number_stops_both_before_the_update(two):
    kind, told, everywhere = two[0]["infinite"]
    assert kind == "InputError" and everywhere
    assert "before update 4: loss is inf on rows r" in told


def test_a_stop_on_one_stops_both_and_the_run_goes_on(place, two):
    assert [said["cut"][0] for said in two] == ["KeyboardInterrupt"] * 2
    assert two[0]["cut again"]["steps"] == 12
    assert furthest(weights(place / "cut"), weights(place / "two")) == 0


def test_a_run_of_two_goes_on_with_one_when_that_is_forced(place, one, two):
    from ftnb.plan import InputError
    from ftnb.train import train

    with pytest.raises(InputError, match="processes was 2, is 1"):
        train(*one[1:], place / "cut-for-one")
    train(*one[1:], place / "cut-for-one", force=True)
    assert furthest(weights(place / "cut-for-one"), weights(place / "one")) <= 1e-5


def command(place, *more):
    sets = [word for pair in (*FAST, "dtype=float32", *more) for word in ("--set", pair)]
    data = ["--data", place / "toy.csv", "--task", "classification", "--model", place / "model"]
    return ["train", *data, *sets]


@pytest.mark.slow
def test_the_command_line_ends_with_the_code_of_its_processes(place, two):
    began = time.monotonic()
    refused = ftnb(*command(place), "--out", "two", "--launch", "2", cwd=place, OMP_NUM_THREADS="1")
    assert refused.returncode == 2 and time.monotonic() - began < 60
    lines = [line for line in refused.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("ftnb: error: two holds another run"), refused.stderr


@pytest.mark.parametrize("kind", SHARED_BY)
def test_the_shipped_files_are_what_accelerate_would_write(kind, tmp_path):
    launch_config(kind).to_yaml_file(tmp_path / "new.yaml")
    assert config_file(kind).read_text() == (tmp_path / "new.yaml").read_text()


def test_the_sky_file_runs_the_command_that_accelerate_understands():
    from accelerate.commands.launch import launch_command_parser

    words = ["train", "--data", "shop's rows.csv", "--out", "/shared/shop"]
    task = yaml.safe_load(
        sky_task(words, machines=2, gpus=4, accelerator="A100", shared="/shared", volume="runs")
    )
    assert task["num_nodes"] == 2 and task["resources"] == {"accelerators": "A100:4"}
    assert task["volumes"] == {"/shared": "runs"}
    where = {"rank": "$SKYPILOT_NODE_RANK", "address": "$MASTER", "config": "$CONFIG", "threads": "$THREADS"}
    assert task["run"].strip().splitlines()[-1] == launch_command(words, 8, 2, **where)
    env = {
        **os.environ,
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "PYTHONPATH": str(ROOT),
    }
    heard = task["run"].replace("accelerate launch", "printf '%s\\n'")
    told = subprocess.run(["bash", "-ec", heard], env=env, capture_output=True, text=True, check=True).stdout
    args = launch_command_parser().parse_args(told.splitlines())
    assert (args.machine_rank, args.main_process_ip, args.num_processes) == (1, "10.0.0.7", 8)
    assert args.config_file == str(config_file()) and args.training_script_args == words


def test_a_word_with_a_blank_stays_one_word():
    line = launch_command(["train", "--system", "Say $1 or 'two'."], 2)
    assert shlex.split(line)[-2:] == ["--system", "Say $1 or 'two'."]


def started(place, out, *more):
    words = [*command(place, *more), "--out", out, "--launch", "2"]
    return begin(*words, cwd=place, OMP_NUM_THREADS="1", IN_TEST="1")


def workers(process):
    import psutil

    return [c for c in psutil.Process(process.pid).children() if "ftnb.cli" in " ".join(c.cmdline())]


LONG = ("epochs=12", "evals_per_epoch=3", "early_stopping=0")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "second process"])
def test_ctrl_c_saves_and_the_same_command_goes_on(place, to):
    out = f"stopped-{to[0]}"
    process = started(place, out, *LONG)
    wait_for_step(place / out, 10, process, 180)
    assert len(workers(process)) == 2
    target = process if to == "launcher" else max(workers(process), key=lambda c: int(c.environ()["RANK"]))
    target.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=90)
    assert process.returncode == 130, told
    assert told.count("ftnb: interrupted") == 1 and "Traceback" not in told
    assert not (place / out / "run.json").exists()
    for name in (out, "uninterrupted"):
        again = started(place, name, *LONG)
        assert again.communicate(timeout=180) and again.returncode == 0
    assert furthest(weights(place / out), weights(place / "uninterrupted")) == 0


@pytest.mark.slow
def test_a_process_that_dies_takes_the_other_with_it(place):
    process = started(place, "killed", *LONG)
    wait_for_step(place / "killed", 10, process, 180)
    max(workers(process), key=lambda c: int(c.environ()["RANK"])).kill()
    began = time.monotonic()
    _, told = process.communicate(timeout=90)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert "Traceback" not in told, told


@pytest.mark.slow
def test_a_folder_in_use_is_refused_with_one_line(place):
    from ftnb.plan import locked

    with locked(place / "held"):
        refused = ftnb(*command(place), "--out", "held", "--launch", "2", cwd=place, OMP_NUM_THREADS="1")
    assert refused.returncode == 2 and refused.stderr.count("being written by another process") == 1
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr


OUT_OF_MEMORY = """
import torch
import ftnb.cli as cli
import ftnb.train as module
from ftnb.train import everyone, train
step = module.Trainer.training_step
def cramped(self, *args, **kwargs):
    if everyone().process_index == 1 and self.state.global_step == 2:
        raise torch.OutOfMemoryError("played")
    return step(self, *args, **kwargs)
module.Trainer.training_step = cramped
sys.exit(cli.guarded(lambda: train(*job(), "cramped")))
"""


@pytest.mark.slow
def test_out_of_memory_on_one_ends_both_and_says_where(place):
    process = begun(place, "memory.py", OUT_OF_MEMORY, place / "model")
    _, told = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "process 1 is out of memory with 4 rows at once" in told, told


# accelerate switches FSDP on for accelerators only; told that a CPU is one, it runs on gloo
SHARDED = """
import torch
torch.distributed.init_process_group("gloo")
from accelerate.state import PartialState
from accelerate.utils import DistributedType
os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
from torch.distributed.fsdp import FSDPModule
import ftnb.train as module
from ftnb.train import train
seen, end = set(), module.Evidence.on_step_end
def look(self, args, state, control, model=None, **kwargs):
    seen.update((isinstance(model, FSDPModule), type(p).__name__) for p in model.parameters())
    return end(self, args, state, control, model=model, **kwargs)
module.Evidence.on_step_end = look
train(*job(method=os.environ["METHOD"]), "sharded-" + os.environ["METHOD"])
assert seen == {(True, "DTensor")}, seen
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_sharded_weights_have_the_loss_of_one_process(method, place, one, monkeypatch):
    from ftnb.train import Run, load_run, train

    monkeypatch.setenv("METHOD", method)
    process = begun(place, "sharded.py", SHARDED, place / "model", "fsdp2")
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told[-2000:]
    run = Run.load(place / f"sharded-{method}")
    alone = one[0] if method == "lora" else train(one[1].replace(method=method), one[2], place / "full")
    for name in ("loss", "eval_loss"):
        gaps = [abs(a[name] - b[name]) for a, b in zip(alone.history, run.history, strict=True) if name in a]
        print(f"fsdp2 {method} {name}: {len(gaps)} values, largest difference {max(gaps):.1e}")
        assert gaps and max(gaps) <= 1e-4
    mine, theirs = (dict(load_run(r)[0].named_parameters()) for r in (alone, run))
    assert furthest(mine, theirs) <= 1e-3
