"""Draw which module imports which, from the syntax trees of ftnb/*.py, in layers by notebook number.

    python tools/architecture.py [--check]

Writes nbs/images/architecture.txt (every import, one module a line), nbs/images/architecture.png (the same, drawn) and
the section between the `architecture` marks of CONTRIBUTING.md. --check compares the two texts and draws nothing.
"""

import ast
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT, PICTURE, PAGE = "nbs/images/architecture.txt", "nbs/images/architecture.png", "CONTRIBUTING.md"
MARKS = re.compile(r"(<!-- architecture: .*? -->\n).*?(<!-- /architecture -->)", re.S)
ROW, LANE = (
    6,
    0.3,
)  # boxes side by side at most, as 800 pixels hold no more names; a lane is this much of a box
FILLS = ("#e8eef4", "#fdf3dc", "#e6f4ea", "#f3e9f7", "#fde8e4", "#e3f1f5", "#f4f1e8", "#ececec")
LINES = ("#1f4e79", "#8a5a00", "#1b6b3a", "#6a2c8a", "#a03020", "#0f6674", "#66592e", "#444444")


def numbers(root: Path = ROOT) -> dict[str, str]:
    "Module -> number of the notebook it comes from, in reading order."
    notebooks = sorted(p.stem for p in (root / "nbs").glob("[0-9]*_*.ipynb"))
    pairs = (name.partition("_") for name in notebooks)
    return {module: number for number, _, module in pairs if (root / f"ftnb/{module}.py").is_file()}


def imported(text: str) -> set[str]:
    "Names of ftnb's modules that a module's text imports, at its top or inside a function."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level:
                parts = ["ftnb", *filter(None, parts)]
            if parts[0] == "ftnb":
                found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("ftnb.")}
    return found


def graph(root: Path = ROOT) -> dict[str, list[str]]:
    "Module -> the modules it imports, both in reading order."
    order = list(numbers(root))
    found = {m: imported((root / f"ftnb/{m}.py").read_text("utf-8")) for m in order}
    return {m: [o for o in order if o in found[m]] for m in order}


def as_text(edges: dict[str, list[str]], number: dict[str, str]) -> str:
    "One line a module: what the test compares, and what a reader who sees no picture reads."
    return "".join(f"{number[m]} {m}: {', '.join(found) or '-'}\n" for m, found in edges.items())


def wide(edges: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    "Modules drawn as bars without arrows: those that import, and those imported by, more than half of the others."
    half = (len(edges) - 1) / 2
    users = {m: sum(m in found for found in edges.values()) for m in edges}
    return [m for m in edges if len(edges[m]) > half], [m for m in edges if users[m] > half]


def reduced(edges: dict[str, list[str]]) -> dict[str, list[str]]:
    "The same without an import that a chain of others implies: fewest arrows, same order."

    def below(m):
        return {m}.union(*(below(o) for o in edges[m]))

    return {
        m: [o for o in found if not any(o in below(x) for x in found if x != o)] for m, found in edges.items()
    }


def rows(edges: dict[str, list[str]], number: dict[str, str]) -> list[list[str]]:
    "Modules from the bottom row to the top one: a band for each number, and in it what is imported below what imports it."
    above, under = wide(edges)
    depth: dict[str, tuple] = {}
    for m in edges:
        band, inside = number[m][:2], [o for o in edges[m] if number[o][:2] == number[m][:2]]
        steps = max((depth[o][1] + (m not in under) for o in inside if o not in under), default=1)
        depth[m] = (band, steps + list(edges).index(m) * (m in above)) if m not in under else (band, 0)
    made = []
    for key in sorted(set(depth.values())):
        row = [m for m in edges if depth[m] == key]
        if key[1] == 0:
            made += [[m] for m in row]
            continue
        parts = -(-len(row) // (ROW - 1))  # the rest of the width is for lanes
        made += [row[i::parts] for i in range(parts)]
    return made


def lanes(table: list[list[str]], arrows: dict[str, list[str]]) -> tuple[list[list], list[tuple]]:
    "Rows with a lane wherever arrows to one module pass by, and the links from row to row."
    level = {m: i for i, row in enumerate(table) for m in row}
    full, links = [list(row) if row[0] in arrows else [] for row in table], set()
    for m, found in arrows.items():
        for o in found:
            path = [m, *((o, i) for i in range(level[m] - 1, level[o], -1) if full[i]), o]
            for lane in path[1:-1]:
                if lane not in full[lane[1]]:
                    full[lane[1]].append(lane)
            links |= set(zip(path, path[1:], strict=False))
    return full, sorted(links, key=str)


def slots(full: list[list], links: list[tuple], tries: int = 60) -> dict:
    "Where each box and lane stands across the page: of many starts, the one with the fewest crossings and shortest lines."
    near = {n: [b if a == n else a for a, b in links if n in (a, b)] for row in full for n in row}
    row_of = {n: i for i, row in enumerate(full) for n in row}
    broad = {n: LANE if isinstance(n, tuple) else 1.0 for n in near}
    best, cost = {}, float("inf")
    for seed in range(tries):
        draw, at = random.Random(seed), {}
        for row in full:
            for i, n in enumerate(draw.sample(row, len(row))):
                at[n] = (i + 0.5) * ROW / len(row)
        for sweep in range(20):
            for row in filter(None, full if sweep % 2 else full[::-1]):
                wish = {n: sum(at[o] for o in near[n]) / len(near[n]) if near[n] else at[n] for n in row}
                spread(sorted(row, key=wish.get), wish, broad, at)
        crossed = sum(
            (at[a] - at[c]) * (at[b] - at[d]) < 0
            for i, (a, b) in enumerate(links)
            for c, d in links[:i]
            if row_of[a] == row_of[c]
        )
        total = 4 * crossed + sum(abs(at[a] - at[b]) for a, b in links)
        if total < cost:
            best, cost = dict(at), total
    return best


def spread(row: list, wish: dict, broad: dict, at: dict) -> None:
    "Place a row in this order near where each wants to stand, nothing on top of another, all on the page."
    gap = [(broad[a] + broad[b]) / 2 for a, b in zip(row, row[1:], strict=False)]
    low = [broad[row[0]] / 2]
    for g in gap:
        low.append(low[-1] + g)
    slack = ROW - low[-1] - broad[row[-1]] / 2
    moved = [min(max(wish[n] - x, 0.0), max(slack, 0.0)) for n, x in zip(row, low, strict=True)]
    for i in range(1, len(moved)):  # equal shares where two want to change places
        j = i
        while j and moved[j] < moved[j - 1]:
            moved[j - 1] = moved[j] = (moved[j - 1] + moved[j]) / 2
            j -= 1
    moved = [max(moved[: i + 1]) for i in range(len(moved))]
    at.update({n: x + m for n, x, m in zip(row, low, moved, strict=True)})


def draw(edges: dict[str, list[str]], number: dict[str, str], path: Path) -> None:
    "The picture: 800 pixels wide, an arrow from a module down to what it imports."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    above, under = wide(edges)
    inner = [m for m in edges if m not in above + under]
    table = rows(edges, number)
    arrows = reduced({m: [o for o in edges[m] if o in inner] for m in inner})
    full, links = lanes(table, arrows)
    at = slots(full, links)
    level = {n: i for i, row in enumerate(full) for n in row} | {m: i for i, r in enumerate(table) for m in r}
    fig, ax = plt.subplots(figsize=(8, 0.58 * len(table) + 0.1), dpi=100)
    for i, row in enumerate(table):
        ax.axhspan(i - 0.5, i + 0.5, color=FILLS[int(number[row[0]][:2]) % 8], lw=0)
    for upper, lower in links:
        aim = lower[0] if isinstance(lower, tuple) else lower
        (x0, y0), (x1, y1) = (at[upper], level[upper]), (at[lower], level[lower])
        y0, y1 = y0 if isinstance(upper, tuple) else y0 - 0.23, y1 if isinstance(lower, tuple) else y1 + 0.23
        style = "-" if isinstance(lower, tuple) else "-|>,head_length=0.4,head_width=0.18"
        look = {
            "arrowstyle": style,
            "color": LINES[int(number[aim][:2]) % 8],
            "lw": 1.3,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        ax.annotate("", (x1, y1), (x0, y0), arrowprops=look, zorder=2)
    for m in edges:
        x, w = (at[m], 0.9) if m in inner else (ROW / 2, ROW - 0.1)
        said = f"    imports {len(edges[m])} modules" if m in above else ""
        said = f"    imported by {sum(m in f for f in edges.values())} modules" if m in under else said
        box = FancyBboxPatch((x - w / 2, level[m] - 0.23), w, 0.46, boxstyle="round,pad=0,rounding_size=0.08")
        box.set(facecolor="white", edgecolor=LINES[int(number[m][:2]) % 8], linewidth=1.3, zorder=3)
        ax.add_patch(box)
        ax.text(
            x, level[m], f"{number[m]} {m}{said}", ha="center", va="center_baseline", fontsize=9, zorder=4
        )
    ax.set(xlim=(0, ROW), ylim=(-0.5, len(table) - 0.5))
    ax.axis("off")
    fig.subplots_adjust(0, 0, 1, 1)
    fig.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(fig)


def section(edges: dict[str, list[str]], number: dict[str, str]) -> str:
    "What CONTRIBUTING.md says beside the picture."
    above, under = wide(edges)
    total, shown = sum(map(len, edges.values())), [m for m in edges if m not in above + under]
    arrows = sum(map(len, reduced({m: [o for o in edges[m] if o in shown] for m in shown}).values()))
    told = f"{len(edges)} modules, {total} imports between them, every one of an earlier notebook"
    bars = " and ".join(f"`{m}`" for m in above + under)
    return (
        f"\n![{told}]({PICTURE})\n\n{told[0].upper() + told[1:]}. An arrow goes from a module to one that it imports; "
        f"the {arrows} arrows leave out imports that a chain of others implies. {bars} are bars without arrows, as they "
        f"touch more than half of the others. Every import, in words: [architecture.txt]({TEXT}).\n\n"
    )


def main() -> int:
    "Exit code 1 when --check finds the text or the section stale."
    number, edges = numbers(), graph()
    text, page = as_text(edges, number), (ROOT / PAGE).read_text("utf-8")
    fresh = MARKS.sub(lambda m: m[1] + section(edges, number) + m[2], page)
    if "--check" in sys.argv[1:]:
        file = ROOT / TEXT
        if file.exists() and file.read_text("utf-8") == text and fresh == page:
            return 0
        print("the drawing of the imports is stale: run  python tools/architecture.py", file=sys.stderr)
        return 1
    (ROOT / TEXT).write_text(text, encoding="utf-8", newline="\n")
    (ROOT / PAGE).write_text(fresh, encoding="utf-8", newline="\n")
    draw(edges, number, ROOT / PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
