"""Write the tables of README.md and docs/ between their markers, and draw the figures.

    python benchmarks/readme.py [--check]

What comes from measurements is read from ``results/`` and ``literature.json``;
the prediction for a Mac from ``mlxquant plan``; the source tree from the package's docstrings.
``--check`` writes nothing and fails where a page is out of date.
"""

import re
import sys
from pathlib import Path

import figures
import real_tables
import tables
import tree
from record import parser

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": {"quality": tables.quality, "speed": tables.speed, "mac": tables.mac,
                  "tree": tree.tree},
    "docs/results.md": {
        "default-model": tables.default_model, "widths": tables.widths,
        "replicas": tables.replicas, "blocks-trained": real_tables.blocks_trained,
        "tuned-after": real_tables.tuned_after, "talking": real_tables.talking,
        "tasks": real_tables.tasks,
        "kernels": tables.kernels, "metal-body": tables.metal_body,
        "decoding": tables.decoding, "speeds": tables.speeds, "methods": tables.methods,
        "real-models": real_tables.real_models, "making": real_tables.making},
    "docs/answers.md": {"answers": real_tables.answers},
    "docs/architecture.md": {"files": tree.files},
}


def render(page: str) -> tuple[str, str]:
    """A page as it is, and as it should be."""
    old = new = (ROOT / page).read_text(encoding="utf-8")
    for name, make in PAGES[page].items():
        between = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        found = between.search(new)
        if not found:
            raise SystemExit(f"{page} has no place for the table {name}")
        new = f"{new[:found.start()]}{make()}\n{new[found.end():]}"
    return old, new


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--check", action="store_true")
    check, stale = options.parse_args().check, list[str]()
    for page in PAGES:
        old, new = render(page)
        if old != new:
            stale.append(page)
            if not check:
                (ROOT / page).write_text(new, encoding="utf-8")
    if check:
        sys.exit(f"out of date: {', '.join(stale)}: run benchmarks/readme.py" if stale else 0)
    figures.draw_methods()
    figures.draw_replicas()


if __name__ == "__main__":
    main()
