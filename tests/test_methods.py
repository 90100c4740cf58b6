"""Each of the guide's three methods trains, on a toy model: the adapter in float32, also on a 4-bit base; so do switches."""

import json
import sqlite3

import pytest
import torch
from safetensors.torch import load_file

from ftnb.data import Record, Splits
from ftnb.plan import InputError, Recipe
from ftnb.train import load_run, train
from toys import rows, toy_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("methods"))


SIZES = dict(batch_size=8, accumulation=1, epochs=2, evals_per_epoch=1, max_new_tokens=4, r=4, alpha=8)


def small(model, **settings):
    return Recipe(task="classification", model=str(model), learning_rate=1e-2, **SIZES).replace(**settings)


def parts():
    made = [Record(f"r{n}", ({"role": "user", "content": t},), a, a) for n, (t, a) in enumerate(rows(48))]
    return Splits(made[:32], made[32:40], made[40:])


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_method_is_one_word_of_the_recipe(method, model, tmp_path):
    dtype = {} if method == "full" else {"dtype": "bfloat16"}
    run = train(small(model, method=method, **dtype), parts(), tmp_path / "run")
    losses = [h["loss"] for h in run.history if "loss" in h]
    assert losses[-1] < losses[0]
    saved = load_file(
        run.adapter_dir / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    )
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert method == "full" or any(t.abs().sum() > 0 for name, t in saved.items() if "lora_B" in name)
    tuned, _ = load_run(run)
    packed = [p for p in tuned.parameters() if getattr(p, "quant_state", None) is not None]
    assert bool(packed) == (method == "qlora")


def losses(run):
    return [h.get("loss", h.get("eval_loss")) for h in run.history]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_gradient_checkpointing_changes_memory_and_nothing_else(method, model, tmp_path):
    recipe = small(model, method=method, dtype="float32")
    plain = train(recipe, parts(), tmp_path / "plain")
    again = train(recipe.replace(checkpointing="on"), parts(), tmp_path / "again")
    assert losses(again) == pytest.approx(losses(plain), abs=1e-4)
    assert max(losses(plain)) - min(losses(plain)) > 0.1  # something was learnt


def test_tensorboard_shows_losses_and_right_answers(model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(small(model, dtype="float32", tracker="tensorboard"), parts(), tmp_path / "run")
    seen = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    seen.Reload()
    right = {e.step: e.value for e in seen.Scalars("eval/match")}
    assert right == pytest.approx(
        {h["step"]: h["eval_match"] for h in run.history if "eval_match" in h}, abs=1e-5
    )
    assert len(seen.Scalars("train/loss")) == sum("loss" in h for h in run.history)


def test_trackio_keeps_the_run_on_this_machine(model, tmp_path, monkeypatch):
    import trackio.sqlite_storage

    for name in [n for n in vars(trackio.sqlite_storage) if n == "TRACKIO_DIR"]:
        monkeypatch.setattr(trackio.sqlite_storage, name, tmp_path / "trackio")
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("a connection was tried"))
    run = train(small(model, dtype="float32", tracker="trackio"), parts(), tmp_path / "run")
    (held,) = (tmp_path / "trackio").glob("ftnb*.db")
    with sqlite3.connect(held) as db:
        told = [json.loads(row[0]) for row in db.execute("select metrics from metrics order by step")]
    right = [m[k] for m in told for k in m if k.endswith("match")]
    assert right == pytest.approx([h["eval_match"] for h in run.history if "eval_match" in h], abs=1e-5)


def test_a_tracker_that_is_not_there_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr("ftnb.train.find_spec", lambda name: None)
    with pytest.raises(InputError, match="tracker trackio is not installed"):
        train(small(model, dtype="float32", tracker="trackio"), parts(), tmp_path / "run")
