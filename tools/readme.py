"""Render nbs/index.ipynb to README.md without Quarto; with --check, only compare.

    python tools/readme.py [--check]

Markdown cells stand as they are, visible code is fenced, and text or Markdown results follow it. Links between
notebooks work in JupyterLab (NN_page.ipynb), on the site (page.html) and here (nbs/NN_page.ipynb).
"""

import re
import sys
from pathlib import Path

from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT / "nbs/index.ipynb", ROOT / "README.md"
HEAD = "<!-- Rendered from nbs/index.ipynb by tools/readme.py: edit the notebook. -->\n\n"


def directives(source: str) -> list[str]:
    "The `#| …` lines of a cell, without the mark."
    return [line[2:].strip() for line in source.splitlines() if line.startswith("#|")]


def result(output: dict) -> str:
    "One stored output as Markdown."
    data = output.get("data", {})
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```\n{text.rstrip()}\n```" if text.strip() else ""


def cell(c: dict) -> str:
    "One cell as Markdown; an empty string when it is hidden."
    source = "".join(c["source"])
    marks = directives(source)
    if any(m.split()[0] in ("hide", "export", "default_exp", "eval:") and m != "eval: true" for m in marks):
        return ""
    if c["cell_type"] == "markdown":
        return source.strip()
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
    parts = [] if "echo: false" in marks else [f"```python\n{code}\n```"]
    return "\n\n".join(p for p in (*parts, *map(result, c.get("outputs", []))) if p)


def pages() -> dict[str, str]:
    "Page name on the site -> notebook in the repository."
    return {
        re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem): f"nbs/{p.name}"
        for p in sorted((ROOT / "nbs").glob("*.ipynb"))
    }


def render() -> str:
    "README.md as it should stand."
    text = "\n\n".join(filter(None, map(cell, read_nb(INDEX).cells)))
    for page, notebook in pages().items():
        names = f"{page}.html", Path(notebook).name
        text = re.sub(rf"\]\((?:\./)?(?:{'|'.join(map(re.escape, names))})", f"]({notebook}", text)
    text = re.sub(r"\]\(images/", "](nbs/images/", re.sub(r"\]\(\.\./", "](", text))
    return HEAD + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main() -> int:
    "Exit code 1 when --check finds a stale README."
    text = render()
    if "--check" in sys.argv[1:]:
        if README.exists() and README.read_text(encoding="utf-8") == text:
            return 0
        print("README.md is not what nbs/index.ipynb renders to: run  make readme", file=sys.stderr)
        return 1
    README.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
