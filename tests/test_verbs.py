"""The verbs that compare and decide: curve, compare, ledger, decide, and `evaluate` with all systems. Toy model."""

import re

import pytest

from toys import FAST, ftnb, toy_model, write_format


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("verbs"))


def test_curve_says_what_more_rows_would_bring(tmp_path):
    shares = "0.25,0.4,0.6,1"
    data = write_format("text-label", tmp_path)
    done = ftnb("curve", "--data", data, "--shares", shares, "--seeds", 2, "--min-test", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test rows are not looked at" in done.stdout and done.stdout.count(" rows: ") == 4 + 2
    assert re.search(r"outlook +(about|flat|cannot tell)", done.stdout)
    folder = tmp_path / "runs" / "text-label-curve"
    assert (folder / "curve.png").stat().st_size > 5_000
    assert len(list((folder / "points").iterdir())) == 2 * 3 + 1
    for words, said in (
        (("--shares", "0.5,x"), "--shares takes numbers"),
        (("--shares", "0.3,0.6,1"), "needs 4 sizes or more"),
        (("--seeds", "1"), "2 seeds or more"),
    ):
        done = ftnb("curve", "--data", data, "--min-test", 8, *words, cwd=tmp_path)
        assert (done.returncode, said in done.stderr, len(done.stderr.splitlines())) == (2, True, 1), (
            done.stderr
        )


@pytest.fixture(scope="module")
def two_runs(model, tmp_path_factory):
    "A folder that holds runs/one and runs/two, each trained and evaluated."
    folder = tmp_path_factory.mktemp("two")
    data = write_format("text-label", folder)
    for name, rate in (("one", "1e-3"), ("two", "1e-2")):
        settings = [word for pair in (*FAST, "dtype=float32", f"name={name}") for word in ("--set", pair)]
        told = ["--data", data, "--model", model, "--learning-rate", rate, "--min-test", 8, *settings]
        assert ftnb("train", *told, cwd=folder).returncode == 0
        assert ftnb("evaluate", f"runs/{name}", "--systems", "tuned", cwd=folder).returncode == 0
    return folder


@pytest.mark.slow
def test_runs_are_compared_and_the_ledger_tells_them(two_runs):
    done = ftnb("compare", "runs/one", "runs/two", cwd=two_runs)
    assert done.returncode == 0, done.stderr
    assert "changed    learning_rate" in done.stdout and "effect     two " in done.stdout
    done = ftnb("compare", "runs/one", cwd=two_runs)
    assert done.returncode == 2 and "2 runs or more" in done.stderr
    done = ftnb("compare", "runs/one", "runs/none", cwd=two_runs)
    assert done.returncode == 2 and "not a finished run" in done.stderr
    for words in (["ledger"], ["ledger", "runs"]):
        done = ftnb(*words, "--plot", "ledger.png", cwd=two_runs)
        assert done.returncode == 0, done.stderr
        assert "against one: learning_rate" in done.stdout and "next " in done.stdout
    assert (two_runs / "ledger.png").stat().st_size > 5_000
    done = ftnb("ledger", "absent", cwd=two_runs)
    assert done.returncode == 2 and done.stderr.strip().endswith("`ftnb train` makes runs/")


@pytest.mark.slow
def test_six_systems_are_measured_and_decided_between(two_runs, capsys, monkeypatch):
    from ftnb.cli import main

    monkeypatch.chdir(two_runs)
    assert main(["evaluate", "runs/one", "--baselines"]) == 0
    reports = two_runs / "runs/one/reports"
    assert (reports / "retrieved.json").exists() and (reports / "tuned-retrieved.json").exists()
    prices = ["--volume", "5000", "--price-in", "0.5", "--price-out", "1.5", "--hosting", "0.4"]
    assert main(["decide", "runs/one", *prices]) == 0
    assert (two_runs / "runs/one/decision.md").exists() and (two_runs / "runs/one/decision.png").exists()
    assert "decision  " in capsys.readouterr().out
    for words, said in (
        (["decide", "runs/one"], "decide needs your numbers"),
        (
            ["decide", "runs/one", "--volume", "10", "--price-in", "1", "--wrong", "much"],
            "--wrong takes dollars",
        ),
        (["decide", "runs/one", "--volume", "-1", "--price-in", "1"], "volume must be a number above 0"),
    ):
        assert main(words) == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_constrained_answers_are_all_known(two_runs, capsys, monkeypatch):
    from ftnb.cli import evaluate

    monkeypatch.chdir(two_runs)
    (report,) = evaluate("runs/two", systems="tuned", constrain=True)
    assert report.system == "tuned-constrained" and report.metrics["valid_labels"].value == 1.0
    assert (two_runs / "runs/two/reports/tuned-constrained.json").is_file()
    assert "tuned-constrained" in capsys.readouterr().out


def test_answers_without_a_form_cannot_be_constrained():
    from dataclasses import replace

    from ftnb.cli import constrained
    from ftnb.data import store_records
    from ftnb.plan import InputError

    free = [replace(r, completion=f"text {k}", label=None) for k, r in enumerate(store_records()[:5])]
    with pytest.raises(InputError, match="no classes and no frame"):
        constrained(free, "generation")
