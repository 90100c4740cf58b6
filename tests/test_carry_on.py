"""For who carries on: the drawing of the imports is fresh, the page leads somewhere, CI, canary and citation are sound."""

import ast
import datetime
import importlib
import re
import subprocess
import sys

import pytest
import yaml

from conftest import ROOT

sys.path.append(str(ROOT / "tools"))
architecture, canary, install = (importlib.import_module(n) for n in ("architecture", "canary", "install"))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_the_drawing_is_fresh():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/architecture.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 20_000 < (ROOT / architecture.PICTURE).stat().st_size < 200_000


def test_the_graph_is_that_of_the_imports():
    edges = architecture.graph()
    assert "plan" in edges["data"] and edges["plan"] == []
    modules = {p.stem for p in (ROOT / "ftnb").glob("*.py") if not p.stem.startswith("_")}
    assert set(edges) == modules, "a module without a notebook"
    forms = "from .a import x\ndef f():\n    import ftnb.b\n    from ftnb import c\n    from ftnb.d import y"
    assert architecture.imported(forms) == {"a", "b", "c", "d"}


def test_every_arrow_goes_down():
    edges, number = architecture.graph(), architecture.numbers()
    level = {m: i for i, row in enumerate(architecture.rows(edges, number)) for m in row}
    assert sorted(level) == sorted(edges)
    assert [(m, o) for m, found in edges.items() for o in found if level[o] >= level[m]] == []
    kept = architecture.reduced(edges)

    def below(m):
        return set(kept[m]).union(*(below(o) for o in kept[m]))

    assert all(set(found) <= below(m) for m, found in edges.items()), (
        "an import that no chain of arrows shows"
    )


def test_contributing_leads_somewhere():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in link or (ROOT / link).exists(), link
    for path in re.findall(r"`((?:tests|tools|benchmarks|docs|nbs)/[\w./]+)`", text):
        assert (ROOT / path).exists() or path in ("docs/NAME.json",), path
    modules = {p.stem for p in (ROOT / "nbs").glob("*.ipynb")}
    assert set(re.findall(r"`(0\d[a-z]?_\w+)`", text)) <= modules
    for metric in (
        'entry-points."ftnb.metrics"',
        "#| export",
        "Add an exporter",
        "Add a verb",
        "Add a recipe",
    ):
        assert metric in text


def test_the_example_of_a_function_is_python():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 2 and all(ast.parse(block) for block in blocks)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_workflow_is_sound(path):
    flow = yaml.safe_load(path.read_text("utf-8"))
    assert flow["permissions"] == {"contents": "read"} and flow[True], "YAML reads `on` as true"
    for job in flow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 45 and not job["runs-on"].endswith("latest")
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+", step.get("uses", "a/b@v1.0.0"))
            for made in re.findall(r"(?:tools/\w+\.py)", step.get("run", "")):
                assert (ROOT / made).is_file()


def test_ci_runs_the_command_of_the_readme_on_every_supported_python():
    flow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text("utf-8"))
    job = flow["jobs"]["test"]
    assert job["strategy"] == {"fail-fast": False, "matrix": {"python": ["3.11", "3.12", "3.13"]}}
    assert any(step.get("run", "").startswith("make test") for step in job["steps"])
    assert any(step.get("run", "").startswith("make docs") for step in flow["jobs"]["docs"]["steps"])
    weekly = yaml.safe_load((ROOT / ".github/workflows/canary.yml").read_text("utf-8"))
    assert weekly[True]["schedule"][0]["cron"].split()[2:4] == ["*", "*"]


def test_citation_has_the_fields_that_its_schema_asks_for():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cff) and cff["cff-version"] == "1.2.0"
    known = {"cff-version", "message", "type", "title", "abstract", "authors", "version", "license", "url"}
    known |= {"repository-code", "keywords", "date-released", "doi", "identifiers", "commit"}
    assert set(cff) <= known and cff["type"] in ("software", "dataset")
    assert all(set(a) <= {"name", "website", "email", "alias", "orcid"} and a["name"] for a in cff["authors"])
    version = re.search(r'"(.+?)"', (ROOT / "ftnb/__init__.py").read_text("utf-8"))[1]
    assert cff["version"] == version and cff["license"] == "Apache-2.0"
    assert isinstance(cff.get("date-released", datetime.date(2020, 1, 1)), datetime.date)
    assert len(set(cff["keywords"])) == len(cff["keywords"]) >= 1
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")
    assert (ROOT / "CHANGELOG.md").read_text("utf-8").startswith("# Changelog")


def test_the_canary_sees_what_is_gone(tmp_path):
    (tmp_path / "a.py").write_text(
        "from peft import LoraConfig, NoSuchThing\n"
        "from transformers.no_such_part import x\n"
        "from peft.helpers import disable_input_dtype_casting\n"
        "LoraConfig(r=4, no_such_setting=1)\n"
    )
    found = canary.changed(tmp_path)
    assert sorted(line.partition(" (")[0] for line in found) == [
        "a.py: peft.LoraConfig no longer takes no_such_setting=",
        "a.py:1: peft.NoSuchThing is gone",
        "a.py:2: transformers.no_such_part.x is gone",
    ]


def test_the_canary_is_quiet_with_the_tested_versions():
    assert len(canary.used(ROOT / "ftnb")) >= 30
    assert canary.changed(ROOT / "ftnb") == []
    for path in canary.TESTS:
        assert (ROOT / path).is_file()
    for name in canary.NOTEBOOKS:
        assert (ROOT / f"nbs/{name}.ipynb").is_file()


def test_llama_is_built_again_for_another_cpu_or_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "installed", lambda python, name: install.pin(name).split("==")[1])
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    assert not install.llama_stands(tmp_path)  # whoever put it there, for whichever CPU
    (tmp_path / ".ftnb-llama").write_text(install.llama_stamp(), "utf-8")
    assert install.llama_stands(tmp_path)
    with monkeypatch.context() as told:
        told.setenv("CMAKE_ARGS", "-DGGML_NATIVE=OFF")
        assert not install.llama_stands(tmp_path)
    with monkeypatch.context() as moved:
        moved.setattr(install, "cpu", lambda: "avx2")
        assert not install.llama_stands(tmp_path)
    monkeypatch.setattr(install, "installed", lambda python, name: "")
    assert not install.llama_stands(tmp_path)
