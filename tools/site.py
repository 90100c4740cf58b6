"""Build the documentation site from nbs/ into _docs/ without Quarto, then check every internal link.

    python tools/site.py [--quarto] [--check-only]

nbdev processes the notebooks (exports become documented signatures, back-quoted names become links); smalldocs
turns them into HTML from the same _quarto.yml that Quarto would read. With --quarto, `nbdev-docs` does it.
"""

import os
import re
import shutil
import subprocess
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
QUIET = ("format-links", "commonmark", "keep-md", "output-file", "twitter-card", "open-graph")


def page_name(notebook: str) -> str:
    "`01_data.ipynb` -> `data`, as nbdev names pages."
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", notebook.removesuffix(".ipynb"))


def process() -> Path:
    "Run nbdev's part and give every page the name that nbdev's own links use; the folder of processed notebooks."
    from fastcore.nbio import read_nb, write_nb
    from nbdev.config import get_config
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs

    os.chdir(ROOT)
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__(force=True)
    cache = Path(proc_nbs(n_workers=0, force=True))
    source = ROOT / "nbs"
    for folder in ("images",):
        if (source / folder).is_dir():
            shutil.copytree(source / folder, cache / folder, dirs_exist_ok=True)
    for name in ("styles.css", "nbdev.yml", "_quarto.yml"):
        shutil.copy(source / name, cache / name)
    repository = get_config().git_url.rstrip("/")
    names = [p.name for p in source.glob("*.ipynb")]
    sidebar = (source / "sidebar.yml").read_text("utf-8")
    for name in sorted(names):
        page = page_name(name)
        sidebar = sidebar.replace(name, f"{page}.ipynb")
        notebook = read_nb(cache / name)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = re.sub(
                    r"\]\((?:\./)?(\d\d_\w+)\.ipynb", lambda m: f"]({page_name(m[1])}.html", cell.source
                )
                cell.source = re.sub(r"\]\(\.\./", f"]({repository}/blob/main/", cell.source)
        (cache / name).unlink()
        write_nb(notebook, cache / f"{page}.ipynb")
    (cache / "sidebar.yml").write_text(sidebar, "utf-8")
    return cache


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


def build() -> Path:
    "The site, in _docs/."
    from smalldocs.site import build as render

    cache = process()
    site = render(cache, quiet=True)
    for warning in site.warnings:
        if not any(word in str(warning) for word in QUIET):
            print(f"warning: {warning}", file=sys.stderr)
    target = ROOT / "_docs"
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(str(site.out), target)
    return target


def main() -> int:
    "Exit code 1 when a link is broken."
    if "--quarto" in sys.argv[1:]:
        if not shutil.which("quarto"):
            print(
                "ftnb docs: quarto is not installed; without --quarto the site is built by smalldocs",
                file=sys.stderr,
            )
            return 2
        subprocess.run(["nbdev-docs"], cwd=ROOT, check=True)
    elif "--check-only" not in sys.argv[1:]:
        build()
    found = broken(ROOT / "_docs")
    print(*found, sep="\n", end="\n" if found else "")
    pages = len(list((ROOT / "_docs").rglob("*.html")))
    print(f"{pages} pages in _docs/, {len(found)} broken links")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
