"""Bad input: one line on stderr, exit code 2, no traceback, nothing half-written. And help that cannot drift."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys

import pytest

from toys import ftnb, toy_model, write_format

VERBS = (
    "plan",
    "audit",
    "review",
    "sweep",
    "curve",
    "train",
    "evaluate",
    "compare",
    "ledger",
    "decide",
    "labels",
)
VERBS += ("deploy", "serve", "check-endpoint", "bench", "run")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("model"))


def refused(done, *words):
    "The user sees one line that says what is wrong; the exit code is 2."
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(said) == 1 and said[0].startswith("ftnb: error: "), done.stderr
    for word in words:
        assert word in said[0], said[0]


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


BAD_FILES = {
    "missing": (None, ["nope.csv"]),
    "empty": (b"", ["bad.csv"]),
    "header only": (b"text,label\n", ["bad.csv"]),
    "no label column": (b"colour,size\nred,4\nblue,5\n", ["bad.csv", "label"]),
    "one class": (b"text,label\n" + b"".join(b"message %d is here,yes\n" % i for i in range(40)), ["yes"]),
    "binary": (bytes(range(256)) * 20, ["bad.csv"]),
    "too few rows": (b"text,label\nhello there,a\ngood bye,b\n", []),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("verb", ["audit", "run"])
def test_bad_data(case, verb, tmp_path):
    content, words = BAD_FILES[case]
    name = "nope.csv" if content is None else "bad.csv"
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = files(tmp_path)
    refused(ftnb(verb, "--data", name, "--task", "classification", "--out", "out", cwd=tmp_path), *words)
    assert files(tmp_path) == before, "something was left behind"


@pytest.mark.parametrize("name", ["no/such-model", "nosuchfolder/model.gguf", "nosuchalias"])
def test_unknown_model(name, tmp_path):
    data = write_format("csv", tmp_path)
    before = files(tmp_path)
    done = ftnb(
        "run", "--data", data, "--task", "classification", "--model", name, "--out", "out", cwd=tmp_path
    )
    refused(done, name)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["my.csv", "broken.gguf"])
def test_a_file_that_is_no_model(name, tmp_path):
    data = write_format("csv", tmp_path)
    (tmp_path / name).write_bytes(b"not a model at all")
    before = files(tmp_path)
    done = ftnb(
        "run", "--data", data, "--task", "classification", "--model", name, "--out", "out", cwd=tmp_path
    )
    refused(done, name)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat = 1e-4\n", ["learning_rat", "learning_rate"]),
        ("learning_rate = 3.0\n", ["learning_rate", "3.0"]),
        ("method = 'lorra'\n", ["lorra", "lora"]),
        ("epochs = \n", ["my.toml"]),
        ("epochs = 'three'\n", ["epochs"]),
    ],
)
def test_bad_recipe(text, words, tmp_path):
    (tmp_path / "my.toml").write_text(text, encoding="utf-8")
    refused(ftnb("plan", "--recipe", "my.toml", cwd=tmp_path), *words)


@pytest.mark.parametrize(
    "args, words",
    [
        (["plan", "--recipe", "nope.toml"], ["nope.toml"]),
        (["plan", "--set", "lerning_rate=1"], ["learning_rate"]),
        (["plan", "--set", "epochs"], ["FIELD=VALUE"]),
        (["plan", "--epochs", "three"], ["epochs", "three"]),
        (["plan", "--rows", "many"], ["--rows"]),
        (["plan", "--no-such"], ["--no-such"]),
        (["trian"], ["trian", "train"]),
        (["evaluate"], ["run"]),
        (["evaluate", "nowhere"], ["nowhere"]),
        (["deploy", "nowhere"], ["nowhere"]),
        (["serve", "nowhere"], ["nowhere"]),
        (["serve", "nowhere", "--port", "99999"], ["99999"]),
    ],
)
def test_bad_arguments(args, words, tmp_path):
    refused(ftnb(*args, cwd=tmp_path), *words)
    assert files(tmp_path) == []


def test_port_in_use(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        refused(ftnb("serve", "runs/any", "--port", port, cwd=tmp_path), str(port), "in use")


@contextlib.contextmanager
def small_disk(folder, size="2m"):
    "A file system of two megabytes at `folder`, where we may mount one."
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or os.name == "nt" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "ftnb", folder], capture_output=True)
    if done.returncode:
        pytest.skip("this system does not allow mounts")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=False)


def test_no_disk_space_is_seen_before_work_begins(tmp_path, model):
    data = write_format("csv", tmp_path)
    with small_disk(tmp_path / "disk") as disk:
        done = ftnb(
            "run",
            "--data",
            data,
            "--task",
            "classification",
            "--model",
            model,
            "--out",
            disk / "out",
            cwd=tmp_path,
        )
        refused(done, "no disk space")
        assert files(disk) == []


def test_disk_that_fills_while_writing(tmp_path):
    if sys.platform == "win32":
        pytest.skip("file size limits are a POSIX matter")
    code = (
        "import resource, sys, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from ftnb.cli import main; sys.exit(main(['audit', '--out', 'out']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert files(tmp_path) == []


def test_a_folder_that_is_not_a_run_is_not_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear", encoding="utf-8")
    data = write_format("csv", tmp_path)
    refused(
        ftnb("run", "--data", data, "--task", "classification", "--out", "mine", "--fresh", cwd=tmp_path),
        "mine",
    )
    assert (tmp_path / "mine/letter.txt").exists()


def test_help_names_every_option_and_its_meaning(tmp_path, capsys, monkeypatch):
    import importlib

    from fastcore.docments import docments

    from ftnb.plan import Recipe

    cli = importlib.import_module("ftnb.cli")
    monkeypatch.setenv("COLUMNS", "1000")
    assert all(verb in ftnb("--help", cwd=tmp_path).stdout for verb in VERBS)
    for verb in VERBS:
        with pytest.raises(SystemExit, match="^0$"):
            cli.main([verb, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        function = getattr(cli, verb.replace("-", "_"))
        assert function.__doc__.split(";")[0].rstrip(".")[:40] in text
        for name, part in docments(function, full=True, returns=False).items():
            if part["anno"] in (Recipe, cli.Source, cli.General):
                for field, comment in docments(part["anno"], full=True, returns=False).items():
                    assert "--" + field.replace("_", "-") in text
                    assert " ".join(comment["docment"].split()) in text
            else:
                assert " ".join(part["docment"].split()) in text, (verb, name)


def test_a_bug_is_told_from_bad_input(tmp_path):
    code = "import sys, ftnb.cli as c; c.choose_model = lambda *a, **k: 1 / 0; sys.exit(c.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "plan"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("ftnb: bug: ZeroDivisionError")
    done = subprocess.run([*command, "--debug"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_bench_measures_a_server_and_names_what_is_wrong(tmp_path):
    from ftnb.bench import Loads, metronome

    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n', encoding="utf-8")
    with metronome(pieces=3) as url:
        more = ["--clients", "1,2", "--seconds", "0.3", "--hourly", "1", "--out", "loads.json"]
        done = ftnb("bench", url, "asked.jsonl", *more, cwd=tmp_path)
        assert done.returncode == 0 and "| 2 clients |" in done.stdout and "dollars" in done.stdout, (
            done.stderr
        )
        assert [x.clients for x in Loads.load(tmp_path / "loads.json")] == [1, 2]
        refused(ftnb("bench", url, "asked.jsonl", "--clients", "one", cwd=tmp_path), "--clients", "commas")
        refused(ftnb("bench", url, "asked.jsonl", "--clients", "0", cwd=tmp_path), "clients", "1 to 1,024")
    with metronome(status=503) as url:
        done = ftnb("bench", url, "asked.jsonl", "--clients", "1", "--seconds", "0.3", cwd=tmp_path)
        assert done.returncode == 2 and "503" in done.stdout
    asked.write_text("{}\n", encoding="utf-8")
    refused(ftnb("bench", "http://127.0.0.1:9", "asked.jsonl", cwd=tmp_path), "asked.jsonl", "messages")
