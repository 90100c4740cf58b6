"""The claims of the guide, the cells that test them, and what came out: nbs/claims.toml and the page nbs/claims.ipynb.

    python tools/claims.py             the claims counted by verdict
    python tools/claims.py --check [GUIDE]   one line for each thing that is wrong; exit code 1 when there is one
    python tools/claims.py --update [ID ...]   seal these verdicts, or all, to the cells as they are now; then --render
    python tools/claims.py --render    write the page and its figure

A cell says which claims it tests in its first lines: `#| claim: lora-memory, qlora-memory`. A verdict carries a seal:
a hash of those cells, of every earlier cell of their notebook that they take a name from, and of the files of docs/
that any of these names. When one of them changes, the seal no longer fits, and the verdict is older than its cell:
read it again beside the new result, correct it, and seal it. What a cell imports from other modules is not sealed.
"""

import ast
import hashlib
import json
import re
import symtable
import sys
import tomllib
from functools import cached_property
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERDICTS = {
    "holds": ("✓", "#1b7837", "came out as the guide says, for what is named beside it"),
    "depends": ("◐", "#9a6700", "true under a condition that the guide does not give"),
    "fails here": ("✗", "#b2182b", "measured, and it came out otherwise, for what is named beside it"),
    "not shown": ("?", "#5e3c99", "measured, and the interval leaves both answers open"),
    "open": ("○", "#57606a", "could be measured, and nobody has done it here"),
}
KINDS = {
    "advice": "says what to do, not what is so",
    "definition": "says what a word means, or gives an example of it",
    "how-to": "names the steps; the notebooks take them",
    "opinion": "a weight or a taste that no measurement settles",
    "summary": "says again what another sentence says",
    "heading": "a title, a sentence that leads over, a list's first line or a part of the layout",
}
MADE = "<!-- made by tools/claims.py: edit nbs/claims.toml -->"
NUMBER = re.compile(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\w)")


class Wrong(Exception):
    "The ledger cannot be read: the text says what and where."


def sentences(text: str) -> list[tuple[str, str]]:
    "Hash and words of every sentence, heading and list item; the hash sees only letters and digits."
    found = []
    for line in text.splitlines():
        for sentence in re.split(r"(?<=[.!?:])[\"”]?\s+(?=[\"“A-Z0-9])", line.strip()):
            words = re.sub(r"[^0-9a-z]+", " ", sentence.lower()).strip()
            if words:
                found.append((hashlib.sha256(words.encode()).hexdigest()[:10], sentence.strip()))
    return found


def numbers(text: str) -> set[float]:
    "The numbers of a text that stand alone: 80 in `80 %`, nothing in `7B`."
    return {
        float(n.replace(",", "").rstrip(".")) for n in NUMBER.findall(re.sub(r"(?<=\d),(?!\d{3})", " ", text))
    }


def counted(text: str) -> set[str]:
    "Every run of digits of a text, thousands joined: 7 of `7B`, 60 and 80 of `60-80%`."
    return set(re.findall(r"\d+(?:e-\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text)))


def spelled(text: str) -> str:
    "`{80% of 150}` becomes the share with its Wilson interval at 95 %."

    def told(found):
        n, z = int(found[2]), 1.959964
        share = round(float(found[1]) / 100 * n) / n
        middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
        low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
        return f"{found[1]}% ({low:.0%} to {high:.0%}, n = {n})"

    return re.sub(r"\{(\d+(?:\.\d+)?)% of (\d+)\}", told, text)


def anchor(heading: str) -> str:
    "The id that pandoc, and so the site, gives a heading."
    text = re.sub(r"[^\w\s.-]", "", re.sub(r"`|\*", "", heading.lower()))
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text.strip()))


def stored(node: ast.AST) -> set[str]:
    "Names that a statement gives a value to in the scope of the cell."
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(a.asname or a.name).partition(".")[0] for a in node.names}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    loops = [n.target for n in ast.walk(node) if isinstance(n, ast.comprehension)]
    inner = {id(n) for target in loops for n in ast.walk(target)}  # local to their comprehension
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) not in inner)
    return {n.id for n in names if isinstance(n.ctx, ast.Store)}


def taken(tree: ast.Module) -> set[str]:
    "Names that a cell takes from before it: read there, and neither its own nor local to one of its functions."

    def outer(table):
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (table.get_type() == "module" or symbol.is_global()):
                yield symbol.get_name()
        for child in table.get_children():
            yield from outer(child)

    shared = set(outer(symtable.symtable(ast.unparse(tree), "cell", "exec")))
    found, own = set(), set()
    for statement in tree.body:
        read = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        grown = (
            {statement.target.id}
            if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name)
            else set()
        )
        found |= ((read & shared) | grown) - own
        own |= stored(statement)
    return found


class Notebook:
    "A notebook as the ledger sees it: marks, headings, results, and what a cell needs."

    def __init__(self, path: Path):
        self.path = path
        self.name = path.stem
        self.page = re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem)
        self.cells = json.loads(path.read_text("utf-8"))["cells"]
        self.sources = ["".join(c["source"]) for c in self.cells]

    @cached_property
    def marks(self) -> dict[str, list[int]]:
        "Claim -> the cells that say they test it."
        found = {}
        for at, (cell, source) in enumerate(zip(self.cells, self.sources)):
            for line in re.findall(r"(?m)^#\|\s*claim:(.*)$", source) if cell["cell_type"] == "code" else ():
                for name in filter(None, map(str.strip, line.split(","))):
                    found.setdefault(name, []).append(at)
        return found

    def results(self, at: int) -> str:
        "What the cell shows, as text."
        parts = []
        for output in self.cells[at].get("outputs", []):
            data = output.get("data", {})
            parts += [data.get("text/markdown", ""), data.get("text/plain", ""), output.get("text", "")]
        return "\n".join("".join(part) for part in parts)

    def heading(self, at: int) -> str:
        "The nearest heading above the cell."
        for source, cell in zip(self.sources[at::-1], self.cells[at::-1]):
            found = re.findall(r"(?m)^#{2,4} (.+)$", source) if cell["cell_type"] == "markdown" else ()
            if found:
                return found[-1].strip()
        return ""

    @cached_property
    def measured(self) -> str:
        "The section `What we measured`, results included."
        text, inside = [], False
        for at, source in enumerate(self.sources):
            if self.cells[at]["cell_type"] == "markdown" and (heads := re.findall(r"(?m)^## (.+)$", source)):
                inside = heads[-1].strip() == "What we measured"
                text += [source] if "What we measured" in heads else []
            elif inside:
                text += [source, self.results(at)]
        return "\n".join(text)

    @cached_property
    def trees(self) -> list:
        "Each code cell parsed, None for the others."
        found = []
        for cell, source in zip(self.cells, self.sources):
            code = "\n".join("" if line.startswith(("%", "!")) else line for line in source.splitlines())
            try:
                found.append(ast.parse(code) if cell["cell_type"] == "code" else None)
            except SyntaxError:
                found.append(None)
        return found

    @cached_property
    def binds(self) -> list[dict[str, bool]]:
        "For each cell the names it gives a value to; False where it only imports them."
        found = []
        for tree in self.trees:
            names = {}
            for node in getattr(tree, "body", ()):
                names |= dict.fromkeys(stored(node), not isinstance(node, ast.Import | ast.ImportFrom))
            found.append(names)
        return found

    def needs(self, at: int) -> list[int]:
        "The cell and every earlier one that it takes a name from, directly or through another."
        held, waiting = set(), [at]
        while waiting:
            here = waiting.pop()
            if here in held or self.trees[here] is None:
                continue
            held.add(here)
            for name in taken(self.trees[here]):
                before = next((k for k in range(here - 1, -1, -1) if name in self.binds[k]), None)
                if before is not None and self.binds[before][name]:
                    waiting.append(before)
        return sorted(held)


def stripped(source: str) -> str:
    "Code without marks and white space: a formatter changes nothing."
    return re.sub(r"\s+", "", "\n".join(x for x in source.splitlines() if not x.startswith("#|")))


class Ledger:
    "The claims, the notebooks and the page of a project."

    def __init__(self, root: Path = ROOT):
        self.root, self.file = root, root / "nbs/claims.toml"
        try:
            data = tomllib.loads(self.file.read_text("utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise Wrong(f"{self.file.name}: {error}") from None
        self.sections = {s["id"]: s["title"] for s in data.get("section", [])}
        self.claims, self.asides = data.get("claim", []), data.get("aside", [])
        self.books = [Notebook(p) for p in sorted((root / "nbs").glob("*.ipynb"))]

    def cells(self, name: str) -> list[tuple[Notebook, int]]:
        "The cells that test a claim, in the order of the notebooks."
        return [(book, at) for book in self.books for at in book.marks.get(name, ())]

    def seal(self, name: str) -> str:
        "Hash of what a verdict rests on."
        parts = set()
        for book, at in self.cells(name):
            code = [book.sources[k] for k in book.needs(at)]
            parts.add("".join(map(stripped, code)))
            for file in {f for text in code for f in re.findall(r"[\w.-]+\.json(?:l|\.gz)?\b", text)}:
                path = self.root / "docs" / file
                if path.is_file():
                    parts.add(f"{file} {hashlib.sha256(path.read_bytes()).hexdigest()}")
        return hashlib.sha256("\0".join(sorted(parts)).encode()).hexdigest()[:12]

    def counts(self) -> dict[str, int]:
        "Claims by verdict, in the order of VERDICTS."
        return {v: sum(c.get("verdict") == v for c in self.claims) for v in VERDICTS}

    def problems(self, guide: str | None = None) -> list[str]:
        "One line for each thing that is wrong; with the guide's text its sentences are compared, too."
        found, seen = [], set()
        for claim in self.claims:
            name = claim.get("id", "")
            if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) or name in seen:
                found.append(
                    f"claim {name!r}: an id is small letters, digits and single hyphens, and stands once"
                )
                continue
            seen.add(name)
            found += [f"claim {name}: {text}" for text in self._claim(claim)]
        for book in self.books:
            strange = [m for m in book.marks if m not in seen]
            found += [
                f"{book.path.name}: a cell is marked with {m}, which is no claim of claims.toml"
                for m in strange
            ]
        for number, aside in enumerate(self.asides, 1):
            if aside.get("kind") not in KINDS or aside.get("section") not in self.sections:
                found.append(f"aside {number}: needs a section, and a kind of {', '.join(KINDS)}")
            if aside.get("kind") not in ("heading",) and len(aside.get("why", "").split()) < 3:
                found.append(f"aside {number}: says nothing on why no cell tests it")
        return found + ([] if guide is None else self._sentences(guide))

    def _claim(self, claim: dict) -> list[str]:
        found, verdict, cells = [], claim.get("verdict"), self.cells(claim["id"])
        if claim.get("section") not in self.sections:
            found.append(f"no section {claim.get('section')!r}; there are {', '.join(self.sections)}")
        if not claim.get("says") or not claim.get("sentences"):
            found.append("needs `says`, the claim in our words, and the `sentences` that make it")
        if verdict not in VERDICTS:
            return [*found, f"verdict {verdict!r} is none of {', '.join(VERDICTS)}"]
        if verdict == "open":
            if cells or claim.get("seal"):
                found.append("is open, yet a cell is marked with it or it has a seal: give it a verdict")
            if len(claim.get("needs", "").split()) < 4:
                found.append("is open and does not say what a test would take (`needs`)")
            return found
        if not cells:
            return [*found, f"is said to be {verdict!r}, and no cell is marked `#| claim: {claim['id']}`"]
        if not claim.get("here") or not claim.get("on"):
            found.append("needs `here`, what came out, and `on`, the model or data it came out for")
        if claim.get("quality") and not re.search(r"n = \d", spelled(claim.get("here", ""))):
            found.append("is about quality, and `here` gives no n")
        if claim.get("quality") and not re.search(r"\d ?%? to [-+]?\d", spelled(claim.get("here", ""))):
            found.append("is about quality, and `here` gives no interval")
        shown = ""
        for book, at in cells:
            text = book.results(at)
            shown += "\n".join((text, book.sources[at], book.measured))
            if not text.strip() and not re.search(r"\bassert\b|\btest_\w+\(|expect_fail", book.sources[at]):
                if not self.root or not book.cells[at].get("outputs"):
                    found.append(f"cell {at} of {book.path.name} shows nothing and asserts nothing")
        strange = numbers(claim.get("here", "")) - numbers(shown)
        if strange:
            listed = ", ".join(f"{n:g}" for n in sorted(strange))
            found.append(f"`here` has numbers that its cells do not show: {listed}")
        if claim.get("seal") != self.seal(claim["id"]):
            places = ", ".join(f"{b.path.name} cell {at}" for b, at in cells)
            found.append(
                f"the verdict is older than its cell ({places}): read it again, then --update {claim['id']}"
            )
        return found

    def _sentences(self, guide: str) -> list[str]:
        found, known = [], {}
        for entry in (*self.claims, *self.asides):
            for key in entry.get("sentences", ()):
                known.setdefault(key, []).append(entry)
        stand = sentences(guide)
        keys = {key for key, _ in stand}
        for key, text in stand:
            if key not in known:
                found.append(f"sentence {key}: no claim and no aside takes it up: {text[:90]}")
                continue
            digits = counted(re.sub(r"\b(?:Llama|Phi-|GPT-) ?\d", "", text))
            claims = [e for e in known[key] if "says" in e]
            lost = digits - counted(" ".join(e.get("says", "") + " " + e.get("why", "") for e in known[key]))
            if lost and (claims or known[key][0].get("kind") != "heading"):
                found.append(
                    f"sentence {key}: {', '.join(sorted(lost))} stands there and in no claim: {text[:90]}"
                )
        for key in known.keys() - keys:
            name = known[key][0].get("id", "an aside")
            found.append(f"{name}: sentence {key} is not in the guide")
        plain = " ".join(re.findall(r"[0-9a-z]+", guide.lower()))
        for claim in self.claims:
            words = re.findall(r"[0-9a-z]+", claim.get("says", "").lower())
            runs = (" ".join(words[k : k + 8]) for k in range(len(words) - 7))
            if copied := next((run for run in runs if run in plain), ""):
                found.append(f"claim {claim['id']}: `says` copies the guide: {copied}")
        return found

    def update(self, names: list[str] = ()) -> tuple[list[str], list[str]]:
        "Seal the verdicts named, or all, that are otherwise sound; the ids sealed anew, and what kept others from it."
        known = {c["id"] for c in self.claims}
        if strange := [n for n in names if n not in known]:
            raise Wrong(f"no claim {', '.join(strange)}")
        text, done, left = self.file.read_text("utf-8"), [], []
        for claim in self.claims:
            name = claim["id"]
            if claim["verdict"] == "open" or (names and name not in names):
                continue
            faults = [f for f in self._claim(claim) if "older than its cell" not in f]
            if faults:
                left += [f"claim {name}: {fault}; not sealed" for fault in faults]
                continue
            seal = self.seal(name)
            if claim.get("seal") != seal:
                block = re.search(rf'(?ms)^\[\[claim\]\]\nid = "{name}"\n.*?(?=^\[\[|\Z)', text)
                body = re.sub(r"(?m)^seal = .*\n", "", block[0]).rstrip("\n")
                text = f'{text[: block.start()]}{body}\nseal = "{seal}"\n\n{text[block.end() :]}'
                done.append(name)
        self.file.write_text(text.rstrip("\n") + "\n", "utf-8", newline="\n")
        return done, left

    # the page

    def link(self, book: Notebook, at: int) -> str:
        "Where a claim is tested: the notebook, and on the site the heading."
        head = book.heading(at)
        number = book.name[: -len(book.page) - 1] if book.page != book.name else ""
        label = f"{number} {book.page}".strip()
        page = "" if book.name == "claims" else f"{book.name}.ipynb"
        return f"[{label if page else 'this page'}: {head}]({page}#{anchor(head)})"

    def row(self, claim: dict) -> str:
        "One line of a section's table."
        verdict = claim["verdict"]
        mark = VERDICTS[verdict][0]
        kind = verdict.replace(" ", "-")
        links = dict.fromkeys(self.link(book, at) for book, at in self.cells(claim["id"]))
        here = (
            f"{spelled(claim['here']).rstrip('.')}. *{claim['on']}.*"
            if verdict != "open"
            else f"Takes: {claim['needs'].rstrip('.')}."
        )
        if claim.get("near"):
            here += f" Nearest: [{claim['near']}](#c-{claim['near']})."
        cells = [
            f'<span id="c-{claim["id"]}"></span>{claim["says"]} <small>{claim["id"]}</small>',
            f'<span class="verdict v-{kind}">{mark} {verdict}</span>',
            here,
            "; ".join(links) or "–",
        ]
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

    def filters(self) -> str:
        "Two rows of buttons, and the style that hides what is not chosen: no script."
        rules, groups = [], []
        for group, options in (
            (
                "verdict",
                {v.replace(" ", "-"): f"{VERDICTS[v][0]} {v} ({n})" for v, n in self.counts().items()},
            ),
            ("part", {s: t for s, t in self.sections.items() if self.of(s)}),
        ):
            buttons = [(f"{group}-all", "all")] + [(f"{group}-{k}", escape(t)) for k, t in options.items()]
            inputs = "\n".join(
                f'<label for="{i}"><input type="radio" id="{i}" name="claims-{group}"{" checked" * (t == "all")}> {t}</label>'
                for i, t in buttons
            )
            groups.append(f"<fieldset><legend>{group}</legend>\n{inputs}\n</fieldset>")
            for k in options:
                on = f"body:has(#{group}-{k}:checked) {PARTS}"
                if group == "verdict":
                    rules.append(f"{on} tbody tr:not(:has(.v-{k})), {on}:not(:has(.v-{k}))")
                else:
                    rules.append(f"{on}:not(#{anchor(self.sections[k])})")
        style = "\n".join(f"{rule} {{ display: none; }}" for rule in rules)
        colours = "\n".join(
            f".verdict.v-{v.replace(' ', '-')} {{ background: {VERDICTS[v][1]}; }}" for v in VERDICTS
        )
        return (
            f'<style>\n{STYLE}\n{colours}\n{style}\n</style>\n\n<form class="claims-filter">\n'
            + "\n".join(groups)
            + "\n</form>"
        )

    def of(self, section: str) -> list[dict]:
        "The claims of a section, in file order."
        return [c for c in self.claims if c["section"] == section]

    def page(self) -> list[str]:
        "The page's made cells, as Markdown."
        counts = self.counts()
        told = ", ".join(f"{n} {v}" for v, n in counts.items())
        lines = ["| verdict | claims | what it means |", "| --- | ---: | --- |"]
        lines += [f"| {VERDICTS[v][0]} {v} | {n} | {VERDICTS[v][2]} |" for v, n in counts.items()]
        tested = sum(counts.values()) - counts["open"]
        head = (
            f"## What became of {len(self.claims)} claims\n\n"
            f"The guide that this workshop follows makes {len(self.claims)} claims that a measurement could contradict. "
            f"{tested} of them have a cell that tests them here, {counts['open']} have none yet and say what one would "
            "take. Claims are told in our words.\n\n"
            f"![Claims by part of the guide and verdict: {told}](images/claims.svg)\n\n"
            + "\n".join(lines)
            + "\n\n"
            "A verdict speaks of the model, the data and the size named beside it, and of nothing larger. Most were "
            "measured with 135 million parameters, rounded to 4 bits before they came here; the guide speaks of 7 "
            "billion. Each verdict is sealed to the code and the stored numbers it rests on: a test fails when one of "
            "them changes, when a number here is not shown by its cell, and when a claim has no cell."
        )
        cells = [head, f"## The claims\n\n{self.filters()}"]
        for section, title in self.sections.items():
            if rows := [self.row(c) for c in self.of(section)]:
                table = "\n".join(
                    ["| claim | verdict | here | tested in |", "| --- | --- | --- | --- |", *rows]
                )
                cells.append(f"### {title}\n\n{table}")
        count = {k: sum(len(a["sentences"]) for a in self.asides if a["kind"] == k) for k in KINDS}
        asides = ["| kind | sentences | |", "| --- | ---: | --- |"]
        asides += [f"| {k} | {n} | {KINDS[k]} |" for k, n in count.items()]
        why = [
            f"- *{self.sections[a['section']]}*, {a['kind']}: {a['why']}" for a in self.asides if a.get("why")
        ]
        cells.append(
            "## Sentences that claim nothing testable\n\nEvery other sentence of the guide is set aside with a reason.\n\n"
            + "\n".join([*asides, "", *why])
        )
        return [f"{MADE}\n\n{cell}" for cell in cells]

    def figure(self) -> str:
        "Claims by part and verdict, as SVG."
        parts = [(s, t) for s, t in self.sections.items() if self.of(s)]
        most = max((len(self.of(s)) for s, _ in parts), default=1)
        left, unit, high = 150, 250 / most, 24
        height = high * len(parts) + 34
        out = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 420 {height}" width="420" height="{height}" '
            'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        ]
        at = 6
        for verdict, (_, colour, _) in VERDICTS.items():
            out.append(f'<rect x="{at}" y="7" width="11" height="11" fill="{colour}"/>')
            out.append(f'<text x="{at + 15}" y="17" fill="#222">{verdict}</text>')
            at += 34 + 6.4 * len(verdict)
        for k, (section, title) in enumerate(parts):
            y, x = 30 + high * k, left
            out.append(
                f'<text x="{left - 8}" y="{y + 15}" text-anchor="end" fill="#222">{escape(title)}</text>'
            )
            for verdict, (_, colour, _) in VERDICTS.items():
                n = sum(c["verdict"] == verdict for c in self.of(section))
                if n:
                    wide = n * unit
                    out.append(
                        f'<rect x="{x:.1f}" y="{y}" width="{wide - 1:.1f}" height="20" fill="{colour}"/>'
                    )
                    out.append(
                        f'<text x="{x + wide / 2:.1f}" y="{y + 15}" text-anchor="middle" fill="#fff">{n}</text>'
                    )
                    x += wide
        return "\n".join([*out, "</svg>"]) + "\n"

    def rendered(self) -> tuple[str, str]:
        "The page's notebook and its figure as they should stand."
        path = self.root / "nbs/claims.ipynb"
        notebook = json.loads(path.read_text("utf-8"))
        old = ["".join(c["source"]).startswith(MADE) for c in notebook["cells"]]
        if True not in old:
            raise Wrong(f"{path.name} has no cell that begins with {MADE}")
        made = [
            {
                "cell_type": "markdown",
                "id": hashlib.sha256(f"claims {k}".encode()).hexdigest()[:8],
                "metadata": {},
                "source": text.splitlines(keepends=True),
            }
            for k, text in enumerate(self.page())
        ]
        first = old.index(True)
        rest = [c for c, is_old in zip(notebook["cells"], old) if not is_old]
        notebook["cells"] = [*rest[:first], *made, *rest[first:]]
        return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", self.figure()

    def render(self) -> None:
        "Write the page and its figure."
        page, figure = self.rendered()
        (self.root / "nbs/images").mkdir(exist_ok=True)
        (self.root / "nbs/claims.ipynb").write_text(page, "utf-8", newline="\n")
        (self.root / "nbs/images/claims.svg").write_text(figure, "utf-8", newline="\n")

    def stale(self) -> list[str]:
        "One line when the page or its figure is not what the ledger makes."
        wanted = zip(("claims.ipynb", "images/claims.svg"), self.rendered())
        files = {name: (self.root / "nbs" / name, text) for name, text in wanted}
        return [
            f"nbs/{name} is not what the claims make: run  python tools/claims.py --render"
            for name, (path, text) in files.items()
            if not path.exists() or path.read_text("utf-8") != text
        ]


PARTS = "#the-claims section.level3"  # as pandoc nests headings: one for each part
STYLE = """.claims-filter fieldset { border: 1px solid #c9d3dd; margin: 0 0 .75rem; padding: .25rem .75rem .5rem; }
.claims-filter legend { float: none; width: auto; font-size: 1rem; margin: 0; padding: 0 .4rem; }
.claims-filter label { display: inline-block; margin-right: 1rem; padding: .25rem 0; }
#the-claims td { vertical-align: top; }
#the-claims td small { display: block; opacity: .8; overflow-wrap: anywhere; }
#the-claims td span[id] { scroll-margin-top: 5rem; }
.verdict { color: #fff; border-radius: .25rem; padding: .1rem .45rem; white-space: nowrap; }
@media (min-width: 701px) {
  #the-claims table { table-layout: fixed; }
  #the-claims th:nth-child(1) { width: 29%; }
  #the-claims th:nth-child(2) { width: 7.2rem; }
  #the-claims th:nth-child(4) { width: 21%; }
}
@media (max-width: 700px) {
  #the-claims thead { display: none; }
  #the-claims table, #the-claims tbody, #the-claims tr, #the-claims td { display: block; width: 100%; }
  #the-claims tr { border-bottom: 1px solid #c9d3dd; padding: .5rem 0; }
  #the-claims td { border: 0; padding: .2rem 0; }
}"""


def main(arguments: list[str]) -> int:
    "Exit code 1 when --check finds something or --update leaves a verdict unsealed, 2 when the ledger cannot be read."
    guide, left = ROOT.parent / "shared/design/guide.txt", []
    try:
        ledger = Ledger()
        if arguments[:1] == ["--update"]:
            done, left = ledger.update(arguments[1:])
            for claim in Ledger().claims:
                if claim["id"] in done:
                    print(
                        f"sealed {claim['id']}: {claim['says']} -> {claim['verdict']}: {spelled(claim['here'])}"
                    )
            print(*left, sep="\n", end="\n" if left else "")
        if arguments[:1] in (["--update"], ["--render"]):
            Ledger().render()
        elif arguments[:1] == ["--check"]:
            guide = Path(arguments[1]) if arguments[1:] else guide
            text = guide.read_text("utf-8") if guide.exists() or arguments[1:] else None
            found = ledger.problems(text) or ledger.stale()
            print(*found, sep="\n", end="\n" if found else "")
            if text is None:
                print("the guide is not here: whether every sentence of it is taken up was not checked")
            if found:
                return 1
        elif arguments:
            print(__doc__, file=sys.stderr)
            return 2
    except Wrong as error:
        print(f"claims: {error}", file=sys.stderr)
        return 2
    counts = Ledger().counts()
    print(f"{sum(counts.values())} claims: " + ", ".join(f"{n} {v}" for v, n in counts.items()))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
