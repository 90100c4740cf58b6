"""What a stranger's model can do to us, what of ours goes out with an export, and which versions are pinned."""

import json
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

from conftest import ROOT
from ftnb import model as models
from ftnb.foreign import base_identity, check_template, guarded, inspect_folder, inspect_gguf, known_template
from ftnb.model import DEFAULT_MODEL, load_model, load_tokenizer, resolve
from ftnb.package import KEYS, find_leaks
from ftnb.plan import InputError
from toys import toy_model

TRL = Path(sys.modules["trl"].__file__ if "trl" in sys.modules else __import__("trl").__file__).parent


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("foreign") / "toy")


# S9: templates

ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''|attr('__cl' ~ 'ass__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ [messages]|map(attribute='__class__')|list }}",
    "{% set x = lipsum.__globals__ %}{{ x }}",
    "{% for m in messages %}{{ m.items.__self__.__class__ }}{% endfor %}",
    "{% macro f() %}{{ caller.__class__ }}{% endmacro %}{% call f() %}{% endcall %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages.append(1) }}",
]
COSTLY = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ ('x' * 10 ** 5) * 10 ** 5 }}",
    "{{ range(10 ** 9)|list }}",
]


@pytest.mark.parametrize("template", ESCAPES + COSTLY)
def test_a_hostile_template_is_refused(template):
    with pytest.raises(InputError, match="chat template: refused"):
        guarded(template)


def test_an_escape_behind_a_condition_that_a_probe_meets_is_refused():
    with pytest.raises(InputError, match="__class__"):
        guarded("{% if messages|length > 2 %}{{ ''.__class__ }}{% endif %}fine")


@pytest.mark.parametrize("name", ["llama3_2", "qwen3", "gemma3", "phi3", "gptoss", "deepseekv3"])
def test_a_maker_s_template_renders_as_in_transformers(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    from ftnb.foreign import _TOKENS, PROBES

    text = (TRL / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    assert known_template(text) == name and check_template(text) == name
    got = guarded(text)
    for turns, mine in zip(PROBES, got):
        theirs = render_jinja_template([turns], chat_template=text, add_generation_prompt=True, **_TOKENS)[0][
            0
        ]
        if "strftime_now" not in text:  # those write today's date
            assert mine == theirs
        assert mine


def test_a_child_sees_no_key(monkeypatch, tmp_path):
    from ftnb.foreign import _in_child

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = "import os\nprint(json.dumps(sorted(os.environ)))"
    assert "HF_TOKEN" not in _in_child("x", code, {}, 1)


# S10: folders


def plant(folder, what):
    "One fault in a folder that is otherwise a whole model."
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if what == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps([1]))
    elif what == "pickle in disguise":
        (folder / "notes.txt").write_bytes(pickle.dumps([1]))
    elif what == "torch zip in disguise":
        with zipfile.ZipFile(folder / "weights.data", "w") as file:
            file.writestr("archive/data.pkl", b"")
    elif what == "python":
        (folder / "modeling_toy.py").write_text("")
    elif what == "link":
        (folder / "vocab.txt").symlink_to(ROOT / "README.md")
    elif what == "climbing name":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../w.safetensors"}}')
    elif what == "absolute name":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "/w.safetensors"}}')
    elif what == "archive":
        (folder / "more.tar.gz").write_bytes(b"")
    else:
        key, value = what
        config = {"vision_config": {key: value}} | config if key.startswith("_") else config | {key: value}
        (folder / "config.json").write_text(json.dumps(config))


FAULTS = ["pickle", "pickle in disguise", "torch zip in disguise", "python", "link", "climbing name"]
FAULTS += ["absolute name", "archive", ("auto_map", {"AutoModelForCausalLM": "modeling_toy.Toy"})]
FAULTS += [("_attn_implementation_internal", "who/kernel"), ("attn_implementation", "who/kernel")]
FAULTS += [("trust_remote_code", True), ("use_kernels", True)]


@pytest.mark.parametrize("what", FAULTS, ids=str)
def test_a_fault_in_a_folder_is_listed_and_the_folder_not_opened(toy, tmp_path, what):
    import shutil

    folder = Path(shutil.copytree(toy, tmp_path / "model"))
    assert inspect_folder(folder) == [] and resolve(folder) == folder
    plant(folder, what)
    assert len(inspect_folder(folder)) == 1
    for opens in (resolve, load_model, load_tokenizer):
        if opens is not load_tokenizer:
            with pytest.raises(InputError, match="1 thing ftnb does not open"):
                opens(folder)


def test_links_of_the_hub_s_cache_are_no_fault(tmp_path):
    repo = tmp_path / "models--who--what"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to(repo / "blobs" / "1")
    assert inspect_folder(snapshot) == []
    (tmp_path / "elsewhere").write_text("{}")
    (snapshot / "more.json").symlink_to(tmp_path / "elsewhere")
    assert [f.name for f in inspect_folder(snapshot)] == ["more.json"]


def test_nothing_asks_for_remote_code():
    for path in [*(ROOT / "ftnb").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert not re.search(r"trust_remote_code[\"']?\s*[:=]\s*True", path.read_text("utf-8")), path.name


def test_a_hostile_template_in_a_folder_is_not_loaded(toy, tmp_path):
    import shutil

    folder = Path(shutil.copytree(toy, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(
        "{{ ''.__class__ }}" + (folder / "chat_template.jinja").read_text()
    )
    with pytest.raises(InputError, match="it reaches for __class__"):
        load_tokenizer(folder)


# GGUF files, and S14


def tiny_gguf(path, template=""):
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    if template:
        writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_poisoned_or_damaged_gguf_goes_no_further_than_its_process(tmp_path):
    bad = tiny_gguf(tmp_path / "bad.gguf", "{{ cycler.__init__.__globals__ }}")
    with pytest.raises(InputError, match="chat template: refused"):
        resolve(bad)
    data = tiny_gguf(tmp_path / "good.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:-1])
    with pytest.raises(InputError, match="refused"):
        resolve(tmp_path / "cut.gguf")
    (tmp_path / "far.gguf").write_bytes(data[:16] + (2**60).to_bytes(8, "little") + data[24:])
    with pytest.raises(InputError, match="refused"):
        inspect_gguf(tmp_path / "far.gguf", seconds=5)


def test_another_file_under_the_known_name_is_refused(tmp_path, monkeypatch):
    package, inside, digest = models.WHEELS[DEFAULT_MODEL]
    monkeypatch.setenv("FTNB_CACHE", str(tmp_path))
    monkeypatch.setitem(models.WHEELS, DEFAULT_MODEL, (package, inside, "0" * 64))
    with pytest.raises(InputError, match="is not the published file"):
        resolve(DEFAULT_MODEL)
    with pytest.raises(InputError, match="it is another file"):
        inspect_gguf(tiny_gguf(tmp_path / "x.gguf"), digest)


def test_a_base_is_known_by_its_weights_and_not_by_its_word(toy, tmp_path):
    import shutil

    copy = Path(shutil.copytree(toy, tmp_path / "copy"))
    assert base_identity(copy) == base_identity(toy)
    (copy / "manifest.json").write_text(json.dumps({"sha256": "f" * 64}))
    assert base_identity(copy) == base_identity(toy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert base_identity(copy) != base_identity(toy)


# S12: what goes out

SAMPLES = {
    "Hugging Face token": "hf_" + "aB3" * 12,
    "OpenAI or Anthropic key": "sk-" + "proj-" + "aB3" * 10,
    "GitHub token": "ghp_" + "aB3" * 12,
    "GitLab token": "glpat-" + "aB3" * 8,
    "AWS key": "AKIA" + "ABCD2345" * 2,
    "Google key": "AIza" + "aB3x-" * 7,
    "Slack token": "xoxb-" + "123456789012",
    "private key": "-----BEGIN RSA PRIV" + "ATE KEY-----",
    "signed token": "eyJ" + "abcdefghijk.eyJ" + "abcdefghijk.abcdefghijk",
    "path": "/ho" + "me/ann/rows.csv",
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("name", ["README.md", "report.html", "run.json", "shown.ipynb"])
def test_a_planted_key_or_path_is_found(tmp_path, kind, name):
    assert set(SAMPLES) == {*KEYS, "path"}
    text = f"before {SAMPLES[kind]} after"
    cell = {"cell_type": "code", "source": [], "outputs": [{"output_type": "stream", "text": ["ok\n", text]}]}
    (tmp_path / name).write_text(json.dumps({"cells": [cell]}) if name.endswith("ipynb") else text)
    assert [leak.kind for leak in find_leaks(tmp_path)] == [kind]


def test_the_repository_holds_no_key_and_no_path():
    places = [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "docs").glob("*.json")]
    places += [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "recipes").glob("*")]
    assert [str(leak) for place in places for leak in find_leaks(place)] == []


# versions

PAST = {  # package: (first version past them, advisories)
    "torch": ("2.10.0", "CVE-2025-32434, CVE-2026-24747"),
    "transformers": ("5.3.0", "CVE-2026-1839, CVE-2026-4372, CVE-2026-5241, CVE-2024-3568"),
    "jinja2": ("3.1.6", "CVE-2024-56326, CVE-2025-27516"),
    "datasets": ("4.0.0", "loading scripts"),
    "safetensors": ("0.8.0", "files overwritten while mapped"),
    "jupyter-server": ("2.18.0", "stored XSS, CVE-2026-40934"),
    "llama-cpp-python": ("0.2.72", "CVE-2024-34359"),
}


@pytest.mark.parametrize("package", PAST)
def test_pinned_versions_are_past_known_advisories(package):
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert package in pins, f"{package} is not pinned"
    assert Version(pins[package]) >= Version(PAST[package][0]), PAST[package][1]


def test_the_audit_reports_and_never_fails(tmp_path):
    (tmp_path / "pip_audit.py").write_text("import sys; sys.exit('no route to host')")
    env = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, ROOT / "tools/audit.py"], capture_output=True, text=True, env=env, timeout=60
    )
    assert done.returncode == 0 and "NOT CHECKED" in done.stdout and "no route to host" in done.stdout
    found = {
        "name": "a",
        "version": "1",
        "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"], "aliases": ["CVE-1"]}],
    }
    answer = json.dumps({"dependencies": [found, {"name": "b", "version": "1", "vulns": []}]})
    (tmp_path / "pip_audit.py").write_text(f"import sys; print({answer!r}); sys.exit(1)")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/audit.py"], capture_output=True, text=True, env=env, timeout=60
    )
    assert done.returncode == 0 and "1 known for 2 packages" in done.stdout
    assert "a 1: PYSEC-1 CVE-1; fixed in 2" in done.stdout
