"""Write docs/models.md: every model type of mlx-lm, made tiny and quantised by every method.

    python docs/make_models.py           takes some minutes
"""

import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from architectures import CONFIGURATIONS, METHODS, REFUSED, attempt, kind_of, write  # noqa: E402

from mlxquant import MlxquantError  # noqa: E402

HEAD = """\
# Models

Written by `python docs/make_models.py`, which makes a tiny random model of every model type that
mlx-lm 0.32 has (and some variants, `type:variant`), quantises it by each method, loads the result
as it is and as dense weights, holds both against each other and against the source, and generates.
The tests do the same. A number is the relative squared error of the logits against the source's,
random weights throughout: 8 bits for rtn, gptq and awq, 4 bits with K = 2 for replica.

Experts of a mixture are quantised one by one, each for the tokens that reach it. Matrices by head
(multi-head latent attention) are rounded. Routers and what else mlx-lm names stay as it says.

"""


def rows() -> list[str]:
    """One line of the table for each row of the configurations."""
    lines = []
    with tempfile.TemporaryDirectory(prefix="mlxquant-") as folder:
        text = Path(folder) / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
        for number, name in enumerate(sorted(CONFIGURATIONS)):
            source = write(name, Path(folder) / f"{number}")
            cells = [_cell(source, method, text) for method in METHODS]
            lines.append(f"| {name} | {kind_of(name)} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return lines


def _cell(source: Path, method: str, text: Path) -> str:
    out = source.with_name(source.name + method)
    try:
        return f"{attempt(source, method, out, text).from_source:.0e}"
    except MlxquantError:
        return "refused"


def main() -> None:
    lines = rows()
    works = sum("refused" not in line for line in lines)
    table = [f"| model type | kind | {' | '.join(METHODS)} |",
             "|---|---|" + "--:|" * len(METHODS), *lines]
    reasons = [f"- {name}: {reason}." for name, reason in REFUSED.items()]
    (HERE / "models.md").write_text(
        HEAD + f"{works} of {len(lines)} work with every method.\n\n" + "\n".join(table)
        + "\n\nRefused, and why:\n\n" + "\n".join(reasons) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
