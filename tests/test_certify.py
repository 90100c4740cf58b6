"""The certificate: distances that are zero where they must be and not where weights were moved; the rule that picks one."""

import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from ftnb.certify import (
    Agreement,
    answer_logits,
    divergences,
    footprint,
    golden_answers,
    kl_nats,
    merge_bases,
    plot_certificate,
    recommend,
    verify,
)
from ftnb.data import Record, split
from ftnb.deploy import adapted, export, open_gguf
from ftnb.engine import load_for_generation
from ftnb.evaluate import Comparison, Estimate
from ftnb.model import Generation, load_tokenizer
from ftnb.plan import InputError, Recipe
from ftnb.train import train
from toys import rows, toy_model

KINDS = ("adapter", "merged", "gguf-q8_0", "gguf-q4_k_m")


def make(folder, **changes):
    records = [
        Record(f"r{i}", ({"role": "user", "content": t},), a, label=a) for i, (t, a) in enumerate(rows())
    ]
    recipe = Recipe(
        name="toy", task="classification", model=str(folder / "model"), learning_rate=1e-2, r=8, alpha=16
    )
    recipe = recipe.replace(
        epochs=2, batch_size=8, accumulation=1, evals_per_epoch=1, max_new_tokens=6, **changes
    )
    return train(recipe, split(records, val=0.1, test=0.2, seed=0), folder / recipe.method)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certify")
    toy_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return make(folder)


@pytest.fixture(scope="module")
def artifacts(run):
    return {a.kind: a for a in export(run, kinds=KINDS, dtype="float32")}


@pytest.fixture(scope="module")
def agreements(run, artifacts):
    return {kind: verify(a, run, n=8, repeats=0) for kind, a in artifacts.items()}


def test_kl_is_that_of_scipy_and_sees_the_whole_vocabulary():
    from scipy.stats import entropy

    a, b = np.random.default_rng(0).normal(size=(2, 5, 300))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    assert kl_nats(a, b) == pytest.approx(entropy(p, q, axis=-1))
    tail = a.copy()
    tail[:, a.argmin() % 300] += 8  # a token that nobody would have chosen
    assert (kl_nats(a, tail) > 1e-3).all()
    with pytest.raises(InputError, match="not the same answer"):
        kl_nats(a, b[:, :299])


def test_kl_of_large_logits_is_finite():
    a, b = np.array([[1e4, 0.0]], np.float32), np.array([[0.0, 1e4]], np.float32)
    assert kl_nats(a, b).tolist() == [1e4] and kl_nats(a, a).tolist() == [0.0]


def test_control_is_the_run_and_rounding_is_not(agreements):
    control, q8, q4 = (agreements[k] for k in ("adapter", "gguf-q8_0", "gguf-q4_k_m"))
    assert (control.same, control.same_top, control.kl_max) == (
        control.n,
        control.kl.n,
        pytest.approx(0, abs=1e-6),
    )
    assert agreements["merged"].kl_max < 1e-6  # float32: merging itself loses nothing
    assert 1e-9 < q8.kl.value < q4.kl.value and q4.kl.low <= q4.kl.value <= q4.kl.high <= q4.kl_max
    assert q4.compared.n == q4.n and q4.compared.low <= q4.compared.difference <= q4.compared.high


def test_every_position_of_the_answer_counts_and_its_end_too(run, agreements):
    _, wanted = golden_answers(run, 8)
    assert agreements["adapter"].kl.n == sum(len(a.ids) + a.stopped for a in wanted)
    model, n = adapted(run), 5
    free = answer_logits(model, [5, 6, 7], Generation("", (8, 9), True))
    cut = answer_logits(model, [5, 6, 7], Generation("", (8, 9), False))
    assert (len(free), len(cut)) == (3, 2) and np.allclose(free[:2], cut, atol=1e-5)
    whole = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0].detach().numpy()
    assert len(whole) == n and np.allclose(whole[2:], free, atol=1e-5)


def test_llama_cpp_reads_the_same_positions(run, artifacts):
    llm = open_gguf(artifacts["gguf-q8_0"].dir / "model.gguf", 128, logits_all=True)
    whole, one = (Generation("", ids, False) for ids in ((8, 9, 10), (8,)))
    long, short = answer_logits(llm, [5, 6, 7], whole), answer_logits(llm, [5, 6, 7], one)
    llm.close()
    assert np.allclose(long[:1], short, atol=1e-3)  # a shorter answer leaves nothing of the longer one behind
    ours = answer_logits(adapted(run), [5, 6, 7], whole)
    assert 10 * kl_nats(ours, long).max() < kl_nats(ours, long[::-1]).max()  # and none is shifted


def test_a_planted_fault_is_found_where_it_is(run):
    model, (asked, _) = adapted(run), golden_answers(run, 4)
    tokenizer = load_tokenizer(run.adapter_dir)

    class Off(torch.nn.Module):  # the run, but for one position of one answer
        device = torch.device("cpu")

        def forward(self, **given):
            out = model(**given)
            if asked[2].text in tokenizer.decode(given["input_ids"][0]):
                out.logits[0, 1, 7] += 14.0
            return out

    found = divergences(Off(), run, 4)
    places = [(i, at) for i, one in enumerate(found) for at in range(len(one)) if one[at, 0] > 1e-6]
    assert places == [(2, 1)] and found[2][1, 0] > 0.1 and found[2][1, 1] == 0


def test_memory_and_time_are_those_of_a_process_of_its_own(run, artifacts):
    engine = load_for_generation(artifacts["gguf-q8_0"])
    prompts = [engine.prompt(r.messages) for r in run.splits.test[:2]]
    engine.close()
    ballast = np.ones(80_000_000)  # 640 MB here are not in the other process
    taken = footprint(artifacts["gguf-q8_0"], prompts, 4)
    assert taken["memory_idle"] < taken["memory"] < taken["memory_idle"] + ballast.nbytes
    assert taken["repeats"] == 1 and taken["load_s"] > 0 and taken["first_token_ms"] > 0


@pytest.mark.slow
def test_a_changed_file_is_refused_in_the_other_process_too(run, artifacts, tmp_path):
    shutil.copytree(artifacts["gguf-q8_0"].dir, tmp_path / "bad")
    with open(tmp_path / "bad/model.gguf", "ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="changed after it was exported"):
        footprint(replace(artifacts["gguf-q8_0"], dir=tmp_path / "bad"), [[5, 6]])


def test_an_agreement_of_before_still_loads(agreements, tmp_path):
    new = agreements["gguf-q4_k_m"]
    path = new.save(tmp_path / "new.json")
    assert Agreement.load(path) == new
    fields = ("compared", "kl", "kl_max", "kl_at", "same_top", "memory", "memory_idle", "repeats")
    old = {k: v for k, v in asdict(new).items() if k not in fields}
    (tmp_path / "old.json").write_text(json.dumps(old), "utf-8")
    loaded = Agreement.load(tmp_path / "old.json")
    assert (loaded.kl, loaded.memory, loaded.score, loaded.same) == (None, None, new.score, new.same)
    assert recommend([loaded]).startswith("serve gguf-q4_k_m") or recommend([loaded]).startswith("no export")
    plot_certificate([loaded])
    for bad in ("[]", "{}", '{"kind": 3}', "{"):
        (tmp_path / "bad.json").write_text(bad, "utf-8")
        with pytest.raises(InputError, match="is no agreement"):
            Agreement.load(tmp_path / "bad.json")


def one(kind, ms, mb, kl, lost=0.0, p=1.0):
    score, own = (Estimate(v, 100, v - 0.08, v + 0.08) for v in (0.8 - lost, 0.8))
    ends = (-lost - 0.01, -lost + 0.01) if p < 0.05 else (-lost - 0.05, -lost + 0.05)
    test = Comparison(kind, "the run", "accuracy", 100, score.value, own.value, *ends, p, 0.1, 0.05)
    near = Estimate(kl, 1000, kl / 2, kl * 2, "positions")
    head = (kind, 100, 90, 0.82, 0.95, 90, 1000, 900, None, int(mb * 1e6), 1.0, 50.0, ms)
    return Agreement(*head, "accuracy", score, own, compared=test, kl=near)


def test_the_rule_takes_score_then_time_then_kl_then_size():
    pick = lambda *found: recommend(list(found)).split(" (")[0]  # noqa: E731
    assert pick(one("slow", 50, 500, 0), one("quick", 5, 100, 0.1)) == "serve quick"
    assert (
        pick(one("slow", 50, 500, 0), one("quick", 5, 100, 0.1, lost=0.03)) == "serve slow"
    )  # over two points
    assert (
        pick(one("slow", 50, 500, 0), one("quick", 5, 100, 0.1, lost=0.015, p=0.01)) == "serve slow"
    )  # shown
    assert (
        pick(one("slow", 50, 500, 0), one("quick", 5, 100, 0.1, lost=0.02)) == "serve quick"
    )  # at the margin
    assert pick(one("near", 5.4, 200, 0.001), one("quick", 5, 100, 0.1)) == "serve near"
    assert pick(one("near", 5.6, 200, 0.001), one("quick", 5, 100, 0.1)) == "serve quick"  # 12% slower
    assert pick(one("large", 5, 200, 0.1), one("small", 5, 100, 0.1)) == "serve small"
    assert recommend([one("only", 5, 100, 0.1, lost=0.3, p=0.001)]).startswith("no export keeps")


def test_the_rule_says_what_another_assumption_picks():
    found = [one("adapter", 60, 20, 0), one("merged", 40, 270, 1e-4), one("gguf-q8_0", 6, 150, 1e-3)]
    found += [one("gguf-q4_k_m", 5, 110, 0.02, lost=0.1, p=0.001)]
    text = recommend(found)
    assert text.startswith("serve gguf-q8_0")
    for words in ("share one base: adapter", "before time: merged", "before the score: gguf-q4_k_m"):
        assert words in text
    assert "disk counts" not in text  # q8_0 is the smallest that keeps the score: nothing else to say


def test_the_plot_has_every_export_and_marks_one(agreements):
    figure = plot_certificate(list(agreements.values()))
    assert len(figure.axes) == 6 and tuple(figure.get_size_inches()) == (4.0, 3.0)
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names == ["adapter", "merged", "q8_0", "q4_k_m"]
    dark = [p for p in figure.axes[0].patches if p.get_facecolor()[0] < 0.2]
    assert len(dark) == recommend(list(agreements.values())).startswith("serve")


def test_a_qlora_run_is_merged_onto_the_base_it_saw(folder, run):
    pytest.importorskip("bitsandbytes")
    found = merge_bases(make(folder, method="qlora"), 6)
    assert found.unpacked.value < 1e-6 < found.original.low and found.difference.low > 0
    assert str(found).startswith("merge onto the unpacked 4-bit base")
    with pytest.raises(InputError, match="only qlora has two bases"):
        merge_bases(run)
