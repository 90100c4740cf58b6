"Diagnosis: every detector on both sides of its threshold, invariances, malformed histories, and the kept runs judged again."

import ast
import importlib.util
import json
import math
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from ftnb.diagnose import (
    KINDS,
    LIMITS,
    Diagnosis,
    adapter_effect,
    diagnose,
    findings,
    plot_confusion,
    plot_diagnosis,
    read_history,
    run_signals,
    signals,
)
from ftnb.plan import InputError, Recipe
from toys import lines, quick

KEPT = ROOT / "docs/diagnose_runs.json.gz"
RECIPE = Recipe(task="classification", learning_rate=1e-3, warmup_steps=3)
TOP = 5.0 / 0.95


def history(loss=lambda x: 0.1 + 4.9 * math.exp(-12 * x), val=None, match=lambda x: 0.95, n=50, **more):
    "A run of `n` log lines and five evaluations; `loss`, `val`, `match`, `rate`, `norm`, `ends` are functions of 0..1."
    val, rate = val or (lambda x: loss(x) + 0.05), more.get("rate", lambda x: min(1, (x + 0.02) / 0.06))
    norm, ends = more.get("norm", lambda x: 1 + 2 * math.exp(-9 * x)), more.get("ends", lambda x: 1.0)
    made = []
    for i in range(n):
        x = i / (n - 1)
        made.append(
            {"step": 2 * i + 2, "loss": loss(x), "learning_rate": 1e-3 * rate(x), "grad_norm": norm(x)}
        )
        if (i + 1) % (n // 5) == 0:
            scores = {"eval_loss": val(x), "eval_match": match(x), "eval_finished": ends(x), "eval_n": 40}
            made.append({"step": 2 * i + 2} | scores)
    return tuple(made)


def kinds(entries, effect=0.3, majority=0.3, recipe=RECIPE):
    return findings(signals(entries, effect, majority), recipe).kinds


def test_nothing_is_said_of_a_run_that_learns():
    assert kinds(history()) == []
    assert kinds(history(), effect=None, majority=None) == []


def swing(x):  # a loss that swings more the later it is
    return 1 + 4 * math.exp(-12 * x) + 0.9 * math.sin(1e4 * x)


ILL = {
    "divergence": dict(loss=lambda x: 5 - 4 * math.exp(-((x - 0.3) ** 2) / 0.02)),
    "no-effect": dict(loss=lambda x: 5 + 0.01 * math.sin(99 * x), norm=lambda x: 0.0),
    "no-end": dict(ends=lambda x: 0.1, match=lambda x: 0.0),
    "warm-up": dict(rate=lambda x: min(1, (x + 0.02) / 0.8)),
    "plateau": dict(loss=lambda x: 5 - 0.1 * x),
    "under-trained": dict(loss=lambda x: 5 - 3 * x, match=lambda x: 0.2),
    "noise": dict(loss=swing, val=lambda x: 1 + 4 * math.exp(-12 * x)),
    "over-fitting": dict(loss=lambda x: 5 * math.exp(-8 * x), val=lambda x: 2 + 8 * (x - 0.4) ** 2),
    "nothing-learnt": dict(match=lambda x: 0.3),
}


@pytest.mark.parametrize("kind", ILL)
def test_each_fault_is_named(kind):
    said = findings(signals(history(**ILL[kind]), 0.3, 0.3), RECIPE)
    assert said.kinds[0] == kind
    assert any(char.isdigit() for char in said[0].text) and said[0].fix


def test_every_kind_is_reached():
    assert set(ILL) | {"too-short", "disagree"} == set(KINDS)


SIDES = [  # kind, signal, limit, what lies beyond it, other signals of the case
    ("divergence", "effect", "effect_high", 1, {}),
    ("divergence", "rebound", "rebound", 1, {}),
    ("noise", "spike", "spike", 1, {}),
    ("no-effect", "effect", "effect_low", -1, {}),
    ("no-end", "finished", "finished", -1, {}),
    ("warm-up", "warm_up", "warm_up", 1, {}),
    ("plateau", "drop", "drop", -1, {}),
    ("under-trained", "late_fall", "late_fall", 1, {}),
    ("under-trained", "norm_left", "norm_left", 1, {}),
    ("noise", "scatter", "scatter", 1, {}),
    ("over-fitting", "gap", "gap", 1, {"went_on": 0.9}),
    ("over-fitting", "went_on", "went_on", 1, {"gap": 0.9}),
]


@pytest.mark.parametrize("kind,signal,limit,beyond,more", SIDES, ids=[f"{s[0]}-{s[1]}" for s in SIDES])
def test_both_sides_of_each_threshold(kind, signal, limit, beyond, more):
    calm = signals(history(), 0.3, 0.3) | {"best_loss_step": 40.0} | more
    edge = LIMITS[limit]
    assert findings(calm | {signal: edge * (1 + 0.01 * beyond)}, RECIPE).kinds == [kind]
    assert findings(calm | {signal: edge * (1 - 0.01 * beyond)}, RECIPE).kinds == []


def test_few_points_are_called_too_few():
    assert kinds(history(n=5)) == ["too-short"]
    assert kinds([h for h in history() if "loss" in h]) == ["too-short"]
    assert kinds([h for h in history() if "eval_loss" in h]) == ["too-short"]
    assert kinds([]) == ["too-short"]


def test_a_note_where_loss_and_answers_disagree():
    late = dict(match=lambda x: 0.5 + 0.4 * x, val=lambda x: 1 + (x - 0.4) ** 2 / 9)
    said = findings(signals(history(**late), 0.3, 0.3), RECIPE)
    assert said.kinds == ["disagree"] and said[0].severity == "note" and "(n = 40)" in said[0].text
    assert kinds(history(match=lambda x: 0.9, val=late["val"])) == []


def test_the_change_is_a_recipe_that_holds():
    for kind, shape in ILL.items():
        for method in ("lora", "full"):
            recipe = RECIPE.replace(method=method, batch_size=1, accumulation=1, max_grad_norm=0.0)
            change = findings(signals(history(**shape), 0.3, 0.3), recipe).change
            assert recipe.replace(**change) != recipe or not change, kind
    slow = findings(signals(history(**ILL["plateau"]), 0.003, 0.3), RECIPE.replace(learning_rate=1e-6))
    assert slow.change["learning_rate"] >= 1e-4
    wild = findings(signals(history(), 500.0, 0.3), RECIPE)
    assert wild.change["learning_rate"] < RECIPE.learning_rate / 50
    dead = findings(signals(history(**ILL["no-effect"]), 0.0, 0.3), RECIPE)
    assert dead.change == {}  # no setting of the recipe explains it


@quick
@given(
    kind=st.sampled_from([None, *ILL]),
    shift=st.integers(-1, 10**6),
    scale=st.floats(1e-3, 1e3),
    noise=st.integers(0, 10**6),
)
def test_steps_that_start_later_and_losses_of_another_size_change_nothing(kind, shift, scale, noise):
    entries = history(**ILL.get(kind, {}))
    moved = [h | {"step": h["step"] + shift, "tokens": noise, "seconds": noise / 7} for h in entries]
    for key in ("loss", "eval_loss"):
        moved = [h | {key: h[key] * scale} if key in h else h for h in moved]
    assert kinds(moved) == kinds(entries)


@quick
@given(
    st.lists(st.floats(0, 1e6), min_size=8, max_size=70), st.lists(st.floats(0, 1e6), min_size=3, max_size=9)
)
def test_any_curve_gets_an_answer(losses, vals):
    logs = [{"step": i, "loss": x} for i, x in enumerate(losses)]
    evals = [{"step": i * len(losses) // len(vals), "eval_loss": x} for i, x in enumerate(vals)]
    found = signals(logs + evals)
    said = findings(found, RECIPE)
    assert set(said.kinds) <= set(KINDS) and "nan" not in str(said)


MALFORMED = {
    '{"step": 2, "los': "not JSON",
    "[1, 2]": "is an object",
    '{"step": 2}': "neither loss nor eval_loss",
    '{"step": 2, "loss": null}': "loss must be a finite number",
    '{"step": 2, "loss": "1.0"}': "loss must be a finite number",
    '{"step": 2, "loss": Infinity}': "loss must be a finite number",
    '{"step": true, "loss": 1.0}': "step must be a finite number",
    '{"step": 0, "loss": 1.0}': "step 0 comes after step 1",
    '{"step": 2, "loss": 1.0, "grad_norm": NaN}': "grad_norm must be a finite number",
    '{"step": 2, "eval_loss": 1.0, "eval_match": "most"}': "eval_match must be a finite number",
    "[" * 100_000: "not JSON",
}  # fmt: skip


@pytest.mark.parametrize("line", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_history(path)
    assert f"{path}, line 3: " in str(error.value) and MALFORMED[line] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_history_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot read .*history.jsonl"):
        diagnose(tmp_path)
    (tmp_path / "history.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_history(tmp_path / "history.jsonl")


def save_run(folder, entries, recipe=RECIPE):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.jsonl").write_text(lines(entries), encoding="utf-8")
    recipe.save(folder / "recipe.json")
    return folder


def save_adapter(folder, b, r=2, **more):
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {"x.lora_A.weight": torch.ones(r, 8), "x.lora_B.weight": torch.full((4, r), float(b))}
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": r, "lora_alpha": 4} | more))


def test_the_effect_is_that_of_the_product(tmp_path):
    save_adapter(tmp_path, 0.5)
    # B A is a 4 x 8 matrix of 0.5 * 2; its norm is sqrt(32); over sqrt(4) rows, times alpha / r = 2
    assert adapter_effect(tmp_path) == pytest.approx(2 * math.sqrt(32) / 2)
    save_adapter(tmp_path, 0.5, use_rslora=True)
    assert adapter_effect(tmp_path) == pytest.approx(4 / math.sqrt(2) * math.sqrt(32) / 2)
    save_adapter(tmp_path, 0.0)
    assert adapter_effect(tmp_path) == 0
    assert adapter_effect(tmp_path / "absent") is None
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        adapter_effect(tmp_path)


def test_a_run_that_was_interrupted_is_diagnosed_too(tmp_path):
    folder = save_run(tmp_path / "run", history(**ILL["warm-up"]))
    assert diagnose(folder).kinds == diagnose(as_run(folder)).kinds == ["warm-up"]
    save_adapter(folder / "adapter", 0.0)
    assert run_signals(folder)["effect"] == 0 and diagnose(folder).kinds == ["no-effect"]


def as_run(folder):
    from ftnb.train import Run

    return Run(folder, RECIPE, (), 0, {})


def test_figures(tmp_path):
    for kind, shape in ILL.items():
        fig = plot_diagnosis(save_run(tmp_path / kind, history(**shape)))
        seen = "nothing wrong" if kind == "nothing-learnt" else kind  # that one needs the rows of the split
        assert fig.axes[0].get_title(loc="left").startswith(seen)
    late = dict(match=lambda x: 0.5 + 0.4 * x, val=lambda x: 1 + (x - 0.4) ** 2 / 9)
    fig = plot_diagnosis(save_run(tmp_path / "two", history(**late)))
    assert {"lowest loss", "most right"} <= {text.get_text().strip() for text in fig.axes[1].texts}
    plot_diagnosis(save_run(tmp_path / "short", history()[:2]))
    fig = plot_confusion({"noise": {"noise": 3, "plateau": 1}, "healthy": {"healthy": 4}})
    assert sorted(text.get_text() for text in fig.axes[0].texts) == ["1", "3", "4"]


def test_a_diagnosis_shows_and_saves(tmp_path):
    said = findings(signals(history(**ILL["plateau"]), 0.3, 0.3), RECIPE)
    assert "| warning | plateau |" in said._repr_markdown_() and str(said).startswith("warning: plateau: ")
    assert json.loads(said.save(tmp_path / "d.json").read_text())[0]["change"] == said.change
    assert "othing wrong" in Diagnosis()._repr_markdown_() and "nothing wrong" in str(Diagnosis())


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_diagnose", ROOT / "benchmarks/diagnose.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_kept_runs_are_judged_as_reported(bench):
    told, kept = json.loads((ROOT / "docs/diagnose.json").read_text()), bench.load_kept(KEPT)
    assert KEPT.stat().st_size < 300_000
    assert len(kept) == told["runs"] >= 100 and Counter(k["cause"] for k in kept) == bench.COUNTS
    again = bench.judged(kept)
    for half in ("chosen_on", "held_out"):
        assert again[half] == told[half]
    healthy = told["held_out"]["false_alarm"]
    assert healthy["k"] <= 0.2 * healthy["n"]
    assert all(row["n"] >= 6 for row in told["held_out"]["recall"].values())


def test_the_notebook_shows_the_reported_counts():
    cells = json.loads((ROOT / "nbs/04b_diagnose.ipynb").read_text(encoding="utf-8"))["cells"]
    (text,) = [
        s for c in cells if "\nheld_out = " in "\n" + (s := "".join(c["source"])) and c["cell_type"] == "code"
    ]
    told = json.loads((ROOT / "docs/diagnose.json").read_text(encoding="utf-8"))
    assert ast.literal_eval(ast.parse(text).body[0].value) == told["held_out"]["counts"]
    prose = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    for name in ("right", "false_alarm", "missed"):
        row = told["held_out"][name]
        assert f"{row['k']} of {row['n']} ({row['low']:.0%} to {row['high']:.0%})" in prose
