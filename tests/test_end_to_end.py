"""The main job on a toy model, from every input format to a served file. Toy: two random layers, nothing to learn
from its scores; every mechanism is the real one."""

import json
import re

import pytest

from ftnb.cli import main
from ftnb.data import Splits
from toys import FAST, ftnb, rows, toy_model, write_format

FORMATS = [
    "csv",
    "tsv",
    "json",
    "parquet",
    "text-label",
    "prompt-completion",
    "alpaca",
    "messages",
    "sharegpt",
]
WHOLE = ("csv", "parquet", "messages")  # the others differ from these in how they are read, and only in that
KINDS = ("adapter", "merged", "gguf-q8_0", "gguf-q4_k_m")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("toy-model"))


def options(data, model, out):
    sets = [word for pair in FAST for word in ("--set", pair)]
    task = ["--task", "classification"]
    return ["run", "--data", str(data), *task, "--model", str(model), "--out", str(out), *sets]


def whole(*args):
    "The main job, its exports timed in this process: a fresh one for each takes longer than all the rest."
    return [*options(*args), "--repeats", "0"]


def check_run(out):
    html = (out / "report.html").read_text("utf-8")
    text = (out / "report.md").read_text("utf-8")
    assert "<html" in html and "What to do next".lower() in text.lower()
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', html), "the report loads something from elsewhere"
    assert str(out.parent) not in text + html, "the report names a folder of this machine"
    for system in ("base", "few-shot", "tuned", "tfidf"):
        report = json.loads((out / f"reports/{system}.json").read_text("utf-8"))
        assert report["n"] >= 10
        assert report["metrics"]
    exports = {p.name for p in (out / "exports").iterdir() if p.is_dir()}
    assert set(KINDS) <= exports
    recipe = json.loads((out / "recipe.json").read_text("utf-8"))
    assert recipe["task"] == "classification"


@pytest.mark.parametrize("kind", WHOLE)
def test_every_kind_of_file_to_a_report(kind, tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    code = main(whole(write_format(kind, tmp_path), model, out))
    shown = capsys.readouterr()
    assert code == 0, shown.err
    check_run(out)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in WHOLE])
def test_every_other_format_to_a_run_on_the_same_rows(kind, tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *options(write_format(kind, tmp_path), model, "run")[1:]]) == 0, (
        capsys.readouterr().err
    )
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    splits = Splits.load(tmp_path / "run/splits")
    kept = [r for _, side in splits.items() for r in side]
    found = sorted((r.text.removeprefix("Name the kind of message.").strip(), r.completion) for r in kept)
    assert found == sorted(rows())


def test_second_run_reuses_and_another_recipe_is_refused(tmp_path, model):
    data = write_format("csv", tmp_path)
    out = tmp_path / "run"
    first = ftnb(*whole(data, model, out), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "Traceback" not in first.stderr
    adapter = next((out / "adapter").glob("*.safetensors"))
    stamp = adapter.stat().st_mtime_ns
    second = ftnb(*whole(data, model, out), cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert adapter.stat().st_mtime_ns == stamp
    assert second.stdout.count("reused") >= 5, second.stdout
    third = ftnb(*whole(data, model, out), "--learning-rate", "1e-4", cwd=tmp_path)
    assert third.returncode == 2 and "learning_rate" in third.stderr
    fresh = ftnb(*whole(data, model, out), "--learning-rate", "1e-4", "--fresh", cwd=tmp_path)
    assert fresh.returncode == 0, fresh.stderr
    assert "reused" not in fresh.stdout


def test_the_verbs_one_by_one(tmp_path, model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, out = write_format("messages", tmp_path), tmp_path / "one"
    assert main(["train", *options(data, model, out)[1:]]) == 0
    assert main(["evaluate", str(out)]) == 0
    assert main(["deploy", str(out), "--kinds", "adapter,merged,gguf-q8_0", "--repeats", "0"]) == 0
    shown = capsys.readouterr().out
    assert "tuned" in shown and "gguf-q8_0" in shown
