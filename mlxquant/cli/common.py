"""What the verbs share: the app and its help, loading, progress on stderr, results on stdout."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import TIMEOUT_MAX, Timer
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from mlxquant.base import blas
from mlxquant.base.storage import json_text
from mlxquant.base.text import clean

if TYPE_CHECKING:
    from mlxquant.model.loading import LanguageModel

Advance = Callable[..., None]  # (done, total, value | None, title of the part)

PANELS = {
    "Talk with a model": ("chat", "generate", "serve"),
    "Make a model": ("quantize", "tune", "import"),
    "Measure speed and quality": ("bench", "evaluate", "compare", "probe"),
    "Look at models and machines": ("plan", "inspect", "chips", "check"),
}


class _Verbs(TyperGroup):
    """Lists the verbs by what they are for, each with the whole first paragraph of its help."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [verb for verbs in PANELS.values() for verb in verbs]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.commands))
        for title, verbs in PANELS.items():
            with formatter.section(title):
                helps = [(self.commands[verb].help or "").partition("\n\n")[0] for verb in verbs]
                formatter.write_dl([(verb.ljust(width), " ".join(text.split()))
                                    for verb, text in zip(verbs, helps)])


app = typer.Typer(
    cls=_Verbs, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Low-bit inference on MLX, with every speed shown against the bandwidth ceiling.")


def load_model(model: str, revision: str | None, memory: str | None, trust: bool, *,
               probe: bool = True) -> "LanguageModel":
    """Load by name, with the hint for a slow BLAS, and the ceiling measured beforehand."""
    from mlxquant.model.loading import load_folder
    from mlxquant.runtime.probe import read_ceiling
    from mlxquant.sources.names import resolve

    if hint := blas.hint():
        remark(hint)
    if probe:
        read_ceiling()
    with progress("importing, GB:", after=TIMEOUT_MAX) as advance:  # downloads have their own bars
        folder = resolve(model, revision=revision, progress=advance)
    with progress(f"loading {model}", after=2):
        return load_folder(folder, model, memory=memory, trust_remote_code=trust)


@contextmanager
def progress(title: str, after: float = 0.0) -> Iterator[Advance]:
    """A progress bar on stderr, where that is a terminal.

    The context gives a function of (done, total, value, part): a part of the work with
    another title gets a bar of its own. The bar appears with the function's first call, or
    ``after`` so many seconds.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(),
                   MofNCompleteColumn(), TimeRemainingColumn(), console=console, transient=True,
                   redirect_stdout=False, disable=not console.is_terminal)
    tasks = {title: bar.add_task(clean(title), total=None)}

    def advance(done: int, total: int, value: float | None, part: str = title) -> None:
        if part not in tasks:
            tasks[part] = bar.add_task("", total=None)
        shown = part if value is None else f"{part} {value:.2f}"
        bar.update(tasks[part], completed=done, total=total, description=clean(shown))
        bar.start()

    timer = Timer(after, bar.start)
    timer.start()
    try:
        yield advance
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def print_json(value: Any) -> None:
    """A result on stdout, exact in any encoding; raises ``MlxquantError`` for NaN or infinity."""
    text = json_text(value)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2) + "\n"
    print(text, end="")


def print_table(rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """Columns wide enough for everything, the ``left`` ones flush left: no figure is cut short."""
    rows = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [cell.ljust(width) if i in left else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


def remark(text: str) -> None:
    """A line for people on stderr."""
    print(clean(text), file=sys.stderr, flush=True)
