"""What must hold for the project as a whole: one truth, exports in sync, clean notebooks, a fresh README, a whole site."""

import ast
import configparser
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from fastcore.docments import docments
from packaging.requirements import Requirement

from conftest import ROOT, WORKSHOPS

ORDER = [
    "plan",
    "data",
    "audit",
    "review",
    "scale",
    "format",
    "foreign",
    "model",
    "checkpoint",
    "memory",
    "train",
    "diagnose",
    "launch",
    "evaluate",
    "sweep",
    "forgetting",
    "metrics",
    "scoring",
    "curve",
    "baselines",
    "decide",
    "failures",
    "ledger",
    "grounding",
    "package",
    "canaries",
    "deploy",
    "engine",
    "certify",
    "server",
    "endpoint",
    "chat",
    "bench",
    "report",
    "cli",
    "workshop",
]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
NUMBERED = [p for p in NOTEBOOKS if re.match(r"0\d[a-z]?_", p.name)]
MODULES = sorted(p.stem for p in (ROOT / "ftnb").glob("*.py") if not p.stem.startswith("_"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
each_numbered = pytest.mark.parametrize("notebook", NUMBERED, ids=lambda p: p.stem)
each_workshop = pytest.mark.parametrize("notebook", WORKSHOPS, ids=lambda p: p.stem)


def run(*command, **kwargs):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | kwargs.pop("env", {})
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, **kwargs)


def tool(name):
    return shutil.which(name, path=os.path.dirname(sys.executable)) or name


def version():
    return importlib.import_module("ftnb").__version__


def sources(notebook, kind):
    return [
        "".join(c["source"])
        for c in json.loads(notebook.read_text("utf-8"))["cells"]
        if c["cell_type"] == kind
    ]


def test_settings_ini_mirrors_pyproject():
    text = configparser.ConfigParser(delimiters=["="])
    text.read(ROOT / "settings.ini", encoding="utf-8")
    mirror, project, nbdev = dict(text["DEFAULT"]), PROJECT["project"], PROJECT["tool"]["nbdev"]
    assert mirror.pop("lib_name") == project["name"]
    assert mirror.pop("version") == version()
    assert mirror.pop("description") == project["description"]
    assert mirror.pop("keywords").split() == [k.replace(" ", "-") for k in project["keywords"]]
    assert mirror.pop("author") == project["authors"][0]["name"]
    assert (mirror.pop("license"), project["license"]) == ("apache2", "Apache-2.0")
    assert mirror.pop("min_python") == project["requires-python"].removeprefix(">=")
    assert mirror.pop("git_url") == project["urls"]["Repository"]
    assert mirror.pop("requirements").split() == project["dependencies"]
    assert mirror.pop("branch") == "main"
    for key in list(mirror):
        assert mirror.pop(key) == nbdev[key], key
    assert not mirror


def test_changelog_has_the_version():
    assert f"## {version()}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_constraints_pin_every_direct_dependency():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = list(PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    for requirement in map(Requirement, wanted):
        pin = pins.get(requirement.name)
        assert pin, f"constraints.txt has no line for {requirement.name}"
        assert requirement.specifier.contains(pin), f"{requirement} does not admit the tested {pin}"


OTHER_NAMES = {
    "sklearn": "scikit-learn",
    "llama_cpp": "llama-cpp-python",
    "charset_normalizer": "charset-normalizer",
    "detect_secrets": "detect-secrets",
    "stdnum": "python-stdnum",
    "yaml": "PyYAML",
}
OPTIONAL = {
    "ftnb",
    "rouge_score",
    "sacrebleu",
    "IPython",
    "traitlets",
}  # imported only where present, or by notebooks


def test_every_import_is_a_declared_dependency():
    declared = {Requirement(r).name for r in PROJECT["project"]["dependencies"]}
    declared |= {Requirement(r).name for e in PROJECT["project"]["optional-dependencies"].values() for r in e}
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / f"ftnb/{module}.py").read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - OPTIONAL:
                assert OTHER_NAMES.get(name, name) in declared, (
                    f"{module} imports {name}, which nothing declares"
                )


def test_assets_are_hashed():
    lines = [x for x in (ROOT / "assets.txt").read_text("utf-8").splitlines() if x and not x.startswith("#")]
    assert len(lines) == 3
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_store_recipe_is_the_default_job():
    from ftnb.cli import STORE
    from ftnb.plan import Recipe

    assert Recipe.load(ROOT / "recipes/store.toml") == Recipe(**STORE)


@each_numbered
def test_notebook_name_is_its_module(notebook):
    found = [m[1] for s in sources(notebook, "code") if (m := re.search(r"^#\| default_exp (\S+)", s, re.M))]
    assert found == [notebook.stem.partition("_")[2]]
    assert "default_exp" in sources(notebook, "code")[0]


def test_the_numbers_are_the_order():
    assert [p.stem.partition("_")[2] for p in NUMBERED] == ORDER


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_downhill(module):
    tree = ast.parse((ROOT / f"ftnb/{module}.py").read_text("utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ftnb":
            names = [node.module.partition(".")[2] or a.name for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "ftnb"]
        for name in filter(None, names):
            assert ORDER.index(name) < ORDER.index(module), f"{module} imports {name}, which stands above it"


def test_exports_are_in_sync(tmp_path):
    for name in ("nbs", "ftnb"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "runs", ".*")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = run(tool("nbdev-export"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = {p.name: p.read_bytes() for p in (tmp_path / "ftnb").glob("*.py")}
    kept = {p.name: p.read_bytes() for p in (ROOT / "ftnb").glob("*.py")}
    assert sorted(made) == sorted(kept)
    assert not [name for name in made if made[name] != kept[name]], "run nbdev-export"
    for text in (tmp_path / "nbs").glob("llms.txt"):
        assert text.read_bytes() == (ROOT / "nbs" / text.name).read_bytes(), "run nbdev-export"


@each_notebook
def test_notebook_is_clean(notebook, tmp_path):
    from nbdev.clean import nbdev_clean

    (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    copy = shutil.copy(notebook, tmp_path / "nbs")
    nbdev_clean(fname=copy)
    assert (tmp_path / "nbs" / notebook.name).read_bytes() == notebook.read_bytes(), "run nbdev-clean"


@each_notebook
def test_notebook_names_its_kernel(notebook):
    found = json.loads(notebook.read_text("utf-8"))["metadata"].get("kernelspec", {})
    assert found.get("name") == "python3", "JupyterLab would ask for a kernel before it runs a cell"


@each_notebook
def test_outputs_are_small_and_anonymous(notebook):
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    assert len(cells) <= 120
    assert all(c.get("execution_count") is None for c in cells)
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert all(o.get("execution_count") is None for o in outputs)
    assert sum(len(json.dumps(o)) for o in outputs) <= 150_000
    assert not [o for o in outputs if o["output_type"] == "error"]
    text = json.dumps(outputs) + "".join("".join(c["source"]) for c in cells)
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    found = re.findall(r"(?<![\w.:/])/(?:root|home|Users|tmp|work|opt|var)/[\w./-]+|[A-Z]:\\\\Users", text)
    assert not found, found[:3]
    assert "\\r" not in json.dumps([o for o in outputs if o["output_type"] == "stream"]), (
        "a progress bar was stored"
    )


PARTS = [
    "What the guide says, and what we measure",
    "What we measured",
    "Try it",
    "What the next notebook receives",
]


def flow(notebook):
    "The notebook as one text: headings as they stand, code cells as a mark, Markdown results after them."
    parts = []
    for c in json.loads(notebook.read_text("utf-8"))["cells"]:
        source = "".join(c["source"])
        if c["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append("<imports>" if re.search(r"(?m)^(import|from) ", source) else "<code>")
        parts += ["".join(o.get("data", {}).get("text/markdown", "")) for o in c.get("outputs", [])]
    return "\n\n".join(parts)


@each_notebook
def test_first_cell_is_title_and_promise(notebook):
    lines = [line for line in sources(notebook, "markdown")[0].splitlines() if line.strip()]
    assert len(lines) == 2 and lines[0].startswith("# ") and lines[1].startswith("> "), (
        "the site keeps only these"
    )


@each_numbered
def test_seven_parts_in_order(notebook):
    text = flow(notebook)
    pieces = re.split(r"(?m)^## (.+)$", text)
    heads = [head.strip() for head in pieces[1::2]]
    body = dict(zip(heads, pieces[2::2]))
    assert [head for head in heads if head in PARTS] == PARTS, heads
    claims, measured, tries, handed = (heads.index(part) for part in PARTS)
    assert claims == 0 and handed == len(heads) - 1
    assert measured - claims > 2, "steps stand under H2 headings of their own"
    assert "<imports>" in body[PARTS[0]], "imports follow the claims"
    assert re.search(r"(?m)^\|.*\|.*\|", body[PARTS[1]]), "what was measured is a table"
    assert len(re.findall(r"(?m)^(?:\d+\.|[-*]) ", body[PARTS[2]])) >= 3, "three things to change"
    assert body[PARTS[3]].strip()


TAUGHT = [*PARTS[:3], "What to take home"]


@each_workshop
def test_a_workshop_has_its_parts_and_its_exercises(notebook):
    from ftnb.workshop import FIXED, read_workshop

    assert set(FIXED) == set(TAUGHT)
    text = flow(notebook)
    pieces = re.split(r"(?m)^## (.+)$", text)
    heads = [head.strip() for head in pieces[1::2]]
    body = dict(zip(heads, pieces[2::2]))
    assert [head for head in heads if head in TAUGHT] == TAUGHT, heads
    assert heads[0] == TAUGHT[0] and heads[-1] == TAUGHT[-1]
    assert 4 <= len(heads) - len(TAUGHT) <= 6, "four to six sections of its own"
    assert "<imports>" in body[TAUGHT[0]], "imports follow the claims"
    assert re.search(r"(?m)^\|.*\|.*\|", body[TAUGHT[1]]), "what was measured is a table"
    assert len(re.findall(r"(?m)^(?:\d+\.|[-*]) ", body[TAUGHT[2]])) >= 3, "three things to change"
    assert "redict" in body[TAUGHT[2]], "predict first"
    workshop = read_workshop(notebook)  # refuses an exercise that no check follows
    assert len(workshop.exercises) >= 5
    assert sources(notebook, "markdown")[0].startswith("# Workshop: ")


@each_workshop
def test_a_workshop_exports_nothing_and_imports_what_is_public(notebook):
    for source in sources(notebook, "code"):
        assert not re.search(r"^#\| *(default_exp|export|exports|exporti)\b", source, re.M)
        code = "\n".join(x for x in source.splitlines() if not x.startswith(("%", "!")))
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                tops = {a.name.split(".")[0] for a in node.names}
                assert "ftnb" not in tops, "from ftnb.x import name"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ftnb":
                public_names = importlib.import_module(node.module).__all__
                hidden = [a.name for a in node.names if a.name not in public_names]
                assert not hidden, f"{node.module} does not export {hidden}"
                assert node.module.partition(".")[2] in ORDER


@each_notebook
def test_imports_stand_alone(notebook):
    for source in sources(notebook, "code"):
        code = "\n".join(x for x in source.splitlines() if not x.startswith(("#|", "%", "!")))
        kinds = {isinstance(n, ast.Import | ast.ImportFrom) for n in ast.parse(code).body}
        assert len(kinds) < 2, f"a cell mixes imports with work:\n{code[:200]}"


def test_ruff():
    paths = [ROOT / p for p in ("nbs", "tests", "tools", "benchmarks")]
    for command in (["check"], ["format", "--check"]):
        done = run(tool("ruff"), *command, "--no-cache", *paths, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_fresh_and_its_links_lead_somewhere():
    done = run(sys.executable, ROOT / "tools/readme.py", "--check")
    assert done.returncode == 0, done.stderr
    text = (ROOT / "README.md").read_text("utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link:
            assert (ROOT / link).exists(), f"README links to {link}"


def test_command_line_does_not_load_torch():
    code = "import sys, ftnb.plan, ftnb.data, ftnb.cli; print(sorted(m for m in {heavy} if m in sys.modules))"
    heavy = ["torch", "transformers", "trl", "peft", "datasets", "sklearn", "matplotlib"]
    done = run(sys.executable, "-c", code.replace("{heavy}", repr(heavy)), cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def public(module):
    loaded = importlib.import_module(f"ftnb.{module}")
    for name in loaded.__all__:
        value = getattr(loaded, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and value.__module__ == loaded.__name__:
            yield name, value
            inherited = {
                m for base in value.__mro__[1:] if not base.__module__.startswith("ftnb") for m in dir(base)
            }
            for method, function in vars(value).items():
                function = getattr(function, "__func__", function)
                if inspect.isfunction(function) and not method.startswith("_") and method not in inherited:
                    yield f"{name}.{method}", function


@pytest.mark.parametrize("module", MODULES)
def test_every_parameter_is_documented(module):
    for name, value in public(module):
        assert inspect.getdoc(value), f"{module}.{name} has no docstring"
        if inspect.isclass(value) and not hasattr(value, "__dataclass_fields__"):
            continue
        for parameter, part in docments(value, full=True, returns=False).items():
            rest = inspect.signature(value).parameters.get(parameter)
            starred = rest is not None and rest.kind is rest.VAR_KEYWORD  # docments has no place for it
            if parameter not in ("self", "cls") and not starred:
                assert part["docment"], f"{module}.{name}: {parameter} has no comment"


def test_ci_runs_the_readme_command():
    script = (ROOT / ".ci/run").read_text("utf-8")
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "set -euo pipefail" in script and "make test" in script
    assert "make test" in (ROOT / "README.md").read_text("utf-8")
