"""Build the documentation site from nbs/ into _docs/ without Quarto, then check every internal link.

    python tools/site.py [--quarto] [--check-only]

nbdev processes the notebooks (exports become documented signatures, back-quoted names become links); smalldocs
turns them into HTML from the same _quarto.yml that Quarto would read. With --quarto, Quarto does it. Both are then
finished alike: links between pages stay on this site, nothing is fetched from elsewhere, a skip link, named
landmarks, and a place in the order of the Tab key for what scrolls sideways.
"""

import ast
import functools
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path = [
    p for p in sys.path if Path(p or ".").resolve() != ROOT / "tools"
]  # this file must not shadow `site`
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
MORE = "More"
PHASES = (
    (-1, MORE),
    (0, "Plan and data"),
    (2, "Format and model"),
    (4, "Train"),
    (5, "Evaluate and decide"),
    (6, "Deploy"),
    (7, "Command line"),
    (8, "Workshops"),
)
SKIP = '<a class="skip-link" href="#quarto-document-content">Skip to the text</a>'
NAMED = (  # what the renderers leave without a name, or give the wrong role
    ('<nav class="navbar ', '<nav aria-label="Site" class="navbar '),
    ('<nav class="quarto-secondary-nav"', '<nav aria-label="This page" class="quarto-secondary-nav"'),
    ('<nav id="quarto-sidebar"', '<nav aria-label="Notebooks" id="quarto-sidebar"'),
    ('<nav class="page-navigation"', '<nav aria-label="Previous and next" class="page-navigation"'),
    ('<nav id="TOC" role="doc-toc"', '<nav id="TOC" role="doc-toc" aria-label="On this page"'),
    ('<div class="toc-actions">', '<div class="toc-actions" role="navigation" aria-label="Help">'),
    ("<th></th>", "<td></td>"),
    ('<main class="content"', '<main tabindex="-1" class="content"'),
    ('role="navigation" aria-expanded', 'role="button" tabindex="0" aria-expanded'),
)
KEYS = """(() => {
  const reach = () => document.querySelectorAll("pre, .sd-table, .cell-output, .table-responsive").forEach((e) => {
    if (e.scrollWidth > e.clientWidth) e.tabIndex = 0; else e.removeAttribute("tabindex");
  });
  addEventListener("load", reach); addEventListener("resize", reach);
  document.addEventListener("keydown", (e) => {
    if ((e.key === "Enter" || e.key === " ") && e.target.matches('a[role="button"]:not([href])')) {
      e.preventDefault(); e.target.click();
    }
  });
})();"""
QUIET = ("format-links", "commonmark", "keep-md", "output-file", "twitter-card", "open-graph")


def page_name(notebook: str) -> str:
    "`01_data.ipynb` -> `data`, as nbdev names pages."
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", notebook.removesuffix(".ipynb"))


def to_pages(text: str, notebooks: list[str]) -> str:
    "Markdown with every link to a notebook turned into one to its page."

    def page(m):
        return f"]({page_name(m[1])}.html" if m[1] in notebooks else m[0]

    return re.sub(r"\]\((?:\./)?(\w+\.ipynb)", page, text)


def phase(notebook: str) -> str:
    "The section of the sidebar that a notebook stands in."
    number = int(match[0]) if (match := re.match(r"\d+", notebook)) else -1
    return next(name for least, name in reversed(PHASES) if number >= least)


def sidebar(names: list[str]) -> dict:
    "The sidebar: the start page, then a section for each phase, a notebook called by its number and its name."
    sections: dict[str, list] = {}
    for name in sorted(names, key=lambda n: (not n[0].isdigit(), n)):
        page, number = page_name(name), re.match(r"\d+[a-z]?", name)
        text = f"{number[0]} {page}" if number else page.replace("_", " ").capitalize()
        if name != "index.ipynb":
            entry = {"text": text, "href": f"{page}.ipynb"}
            sections.setdefault(phase(name), []).append(entry)
    sections.setdefault(MORE, []).append({"text": "Contributing", "href": "contributing.md"})
    start = {"text": "Start", "href": "index.ipynb"}
    found = [{"section": name, "contents": pages} for name, pages in sections.items()]
    return {"website": {"sidebar": {"contents": [start, *found]}}}


def docstrings() -> dict[str, str]:
    "Name of a function or method of ftnb -> first line of its docstring."
    found = {}
    for path in sorted((ROOT / "ftnb").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                found.setdefault(node.name, text.splitlines()[0])
    return found


def fields() -> dict[tuple, str]:
    "Name and own fields of a data class of ftnb -> its text, comments included."
    found = {}
    for path in sorted((ROOT / "ftnb").glob("*.py")):
        text = path.read_text("utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                names = tuple(n.target.id for n in node.body if isinstance(n, ast.AnnAssign))
                found[node.name, names] = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    return found


def describe(cells: list, said: dict[str, str]) -> None:
    "Give every figure a text for who cannot see it: what the function that draws it says it draws, and the heading."
    heading = ""
    for cell in cells:
        if cell.cell_type == "markdown":
            heading = ([m[1] for m in re.finditer(r"^#+ (.+)$", cell.source, re.M)] or [heading])[-1]
            continue
        drawn = [o for o in cell.get("outputs", []) if {"image/png", "image/svg+xml"} & {*o.get("data", {})}]
        if not drawn or re.search(r"^#\| *fig-alt:", cell.source, re.M):
            continue
        used = re.findall(r"\b(plot\w*|draw\w*)\(", cell.source)
        text = next((said[name] for name in used if name in said), "Figure.").rstrip(".")
        cell.source = f"#| fig-alt: {json.dumps(f'{text}. Part: {heading}')}\n{cell.source}"


def known_names(cells: list, own: str) -> dict[str, str]:
    "Names that a notebook's cells import from ftnb or give -> the module they come from, `own` for the latter."
    found = {}

    def walk(node):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ftnb."):
            found.update({a.asname or a.name: node.module for a in node.names})
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.setdefault(node.name, own)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id, own)
        elif not isinstance(node, ast.Lambda):
            for child in ast.iter_child_nodes(node):
                walk(child)

    for cell in cells:
        if cell.cell_type == "code":
            walk(ast.parse(cell.source))
    return found


def relink(text: str, known: dict[str, str], own: str, places: dict[str, dict]) -> str:
    """nbdev links a back-quoted name to one module that has it, for `train` to `ftnb.cli`. Here it means what the
    notebook imports or makes; where that is no function of ftnb, such as a variable, there is no link."""

    def place(m):
        name = m[1].removesuffix("()")
        there = {
            module: at[f"{module}.{name}"][0] for module, at in places.items() if f"{module}.{name}" in at
        }
        old = next((at for at in there.values() if m[2].endswith(f"/{at}")), None)
        if old is None:
            return m[0]
        origin = known.get(name.partition(".")[0])
        if origin is None:  # the notebook does not use it: a function rather than the command of that name
            origin = own if own in there else min(there, key=lambda module: module == "ftnb.cli")
        new = there.get(origin)
        return f"[`{m[1]}`]({m[2].removesuffix(old)}{new})" if new else f"`{m[1]}`"

    return re.sub(r"\[`([\w.]+(?:\(\))?)`\]\(([^)\s]+)\)", place, text)


def contributing(cache: Path, repository: str) -> None:
    "CONTRIBUTING.md as a page: pictures from the site, notebooks as pages, other files in the repository."
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    text = text.replace("](nbs/images/", "](images/")
    text = re.sub(r"\]\(nbs/(\w+)\.ipynb", lambda m: f"]({page_name(m[1])}.html", text)
    text = re.sub(
        r"\]\((?!images/|https?:|#)([^)]+)\)",
        lambda m: m[0] if m[1].endswith(".html") else f"]({repository}/blob/main/{m[1]})",
        text,
    )
    (cache / "contributing.md").write_text(text, "utf-8")


def process() -> Path:
    "Run nbdev's part and give every page the name that nbdev's own links use; the folder of processed notebooks."
    import yaml
    from fastcore import docments
    from fastcore.nbio import read_nb, write_nb
    from nbdev import config
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs

    from ftnb._modidx import d

    os.chdir(ROOT)
    config._load_toml = functools.cache(config._load_toml)  # nbdev reads the file anew for each cell
    texts, theirs = fields(), docments.get_dataclass_source
    docments.get_dataclass_source = lambda c: (  # nbdev runs a notebook's cells: their classes have no file
        theirs(c) or texts.get((c.__name__, tuple(vars(c).get("__annotations__", ()))), "")
    )
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__(force=True)
    cache = Path(proc_nbs(n_workers=0, force=True))
    source = ROOT / "nbs"
    for folder in ("images",):
        if (source / folder).is_dir():
            shutil.copytree(source / folder, cache / folder, dirs_exist_ok=True)
    for name in ("styles.css", "nbdev.yml", "_quarto.yml"):
        shutil.copy(source / name, cache / name)
    repository = config.get_config().git_url.rstrip("/")
    names, said, places = [p.name for p in source.glob("*.ipynb")], docstrings(), d["syms"]
    for name in sorted(names):
        page = page_name(name)
        notebook, own = read_nb(cache / name), f"ftnb.{page}"
        known = known_names(read_nb(source / name).cells, own)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                if said_there := output.get("data", {}).get("text/markdown"):
                    output["data"]["text/markdown"] = to_pages(
                        relink("".join(said_there), known, own, places), names
                    )
            if cell.cell_type == "markdown":
                cell.source = to_pages(relink(cell.source, known, own, places), names)
                cell.source = cell.source.replace("](../CONTRIBUTING.md", "](contributing.html")
                cell.source = re.sub(
                    r"\A<!-- teacher: (\d+) minutes -->\s*\n(.*)\Z",
                    r"<details><summary>For the teacher, \1 minutes</summary>\n\n\2\n\n</details>",
                    cell.source,
                    flags=re.S,
                )
                cell.source = re.sub(r"\]\(\.\./", f"]({repository}/blob/main/", cell.source)
        describe(notebook.cells, said)
        (cache / name).unlink()
        write_nb(notebook, cache / f"{page}.ipynb")
    contributing(cache, repository)
    text = yaml.safe_dump(sidebar(names), sort_keys=False, allow_unicode=True)
    (cache / "sidebar.yml").write_text(text, "utf-8")
    return cache


def finish(site: Path, url: str) -> None:
    "Make the pages whole without another server, and usable with a keyboard and a screen reader."
    anchors = {p: Page(p.read_text("utf-8")).anchors for p in site.rglob("*.html")}
    for path in anchors:
        text = path.read_text("utf-8")

        def local(m, path=path):
            there = site / (m[1] or "index.html")
            if not there.exists():
                return m[0]
            known = unquote(m[2][1:]) in anchors.get(
                there, ()
            )  # what is not shown has no anchor: its page then
            return f'href="{os.path.relpath(there, path.parent)}{m[2] if known else ""}"'

        text = re.sub(rf'href="{re.escape(url.rstrip("/"))}/([\w/.-]*?)((?:#[^"]*)?)"', local, text)
        for old, new in NAMED:
            text = text.replace(old, new)
        text = re.sub(r"(<body[^>]*>)", rf"\1{SKIP}", text, count=1)
        path.write_text(text.replace("</body>", f"<script>{KEYS}</script></body>"), "utf-8")
    for path in site.rglob("*.css"):
        text = path.read_text("utf-8")
        if "fonts.googleapis.com" in text:
            path.write_text(re.sub(r"@import\s+url\([^)]*fonts\.googleapis\.com[^)]*\);?", "", text), "utf-8")


class Page(HTMLParser):
    "The links and the anchors of one page."

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ("id", "name") and value:
                self.anchors.add(value)
            if value and ((tag, key) in (("a", "href"), ("link", "href")) or key == "src"):
                self.links.append(value)


def broken(site: Path) -> list[str]:
    "One line for each internal link that leads nowhere."
    pages = {p.relative_to(site).as_posix(): Page(p.read_text("utf-8")) for p in sorted(site.rglob("*.html"))}
    found = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith(("data:", "javascript:")):
                continue
            path = unquote(parts.path)
            base = site if path.startswith("/") else (site / name).parent
            target = (base / path.lstrip("/")).resolve() if path else (site / name).resolve()
            if target.is_dir():
                target = target / "index.html"
            if not target.exists() or not target.is_relative_to(site.resolve()):
                found.append(f"{name}: {link}: no such page or file")
                continue
            inside = pages.get(target.relative_to(site.resolve()).as_posix())
            if inside and parts.fragment and unquote(parts.fragment) not in inside.anchors:
                found.append(f"{name}: {link}: no such anchor")
    return found


def site_url() -> str:
    "Where the site will stand, as nbs/nbdev.yml says: nbdev's links begin with it."
    return re.search(r'site-url: "?([^"\s]+)', (ROOT / "nbs/nbdev.yml").read_text("utf-8"))[1]


def build(quarto: bool = False) -> Path:
    "The site, in _docs/: by smalldocs, or by Quarto with the call that `nbdev-docs` makes."
    cache, target = process(), ROOT / "_docs"
    if quarto:
        from nbdev.quarto import render_quarto

        made = cache / "_docs"
        render_quarto(cache, made)
    else:
        from smalldocs.site import build as render

        site = render(cache, quiet=True)
        for warning in site.warnings:
            if not any(word in str(warning) for word in QUIET):
                print(f"warning: {warning}", file=sys.stderr)
        made = site.out
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(str(made), target)
    finish(target, site_url())
    return target


def main() -> int:
    "Exit code 1 when a link is broken."
    quarto = "--quarto" in sys.argv[1:]
    if quarto and not shutil.which("quarto"):
        print(
            "ftnb docs: quarto is not installed; without --quarto the site is built by smalldocs",
            file=sys.stderr,
        )
        return 2
    if "--check-only" not in sys.argv[1:]:
        build(quarto)
    found = broken(ROOT / "_docs")
    print(*found, sep="\n", end="\n" if found else "")
    pages = len(list((ROOT / "_docs").rglob("*.html")))
    print(f"{pages} pages in _docs/, {len(found)} broken links")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
