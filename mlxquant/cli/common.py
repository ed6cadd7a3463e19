"""What the verbs share: the app and its help, loading, progress on stderr, results on stdout."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import TIMEOUT_MAX, Timer
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from mlxquant.base import blas
from mlxquant.base.errors import BadValue
from mlxquant.base.storage import json_text
from mlxquant.base.text import clean

if TYPE_CHECKING:
    from mlxquant.model.loading import LanguageModel

Advance = Callable[..., None]  # (done, total, value | None, title of the part, seconds left)

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


class Panels(TyperCommand):
    """A verb of many options: those of a ``rich_help_panel`` stand under it, after the others."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                usual = "Arguments" if param.param_type_name == "argument" else "Options"
                panel = getattr(param, "rich_help_panel", None) or usual
                panels.setdefault(panel, []).append(record)
        for panel in sorted(panels, key=lambda panel: panel not in ("Arguments", "Options")):
            with formatter.section(panel):
                formatter.write_dl(panels[panel])


app = typer.Typer(
    cls=_Verbs, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Low-bit inference on MLX, with every speed shown against the bandwidth ceiling.")


def given(ctx: typer.Context) -> dict[str, str]:
    """The parameters that the command line names, each with its option's long form."""
    return {param.name or "": param.opts[-1] for param in ctx.command.params
            if (source := ctx.get_parameter_source(param.name or "")) is not None
            and source.name == "COMMANDLINE"}


def refuse(ctx: typer.Context, reason: str, *names: str) -> None:
    """Raise ``BadValue`` with the ``reason`` where one of the parameters was given: it would be
    without effect."""
    for name, option in given(ctx).items():
        if name in names:
            raise BadValue(f"{option} {reason}")


def load_model(model: str, revision: str | None, memory: str | None, trust: bool, *,
               probe: bool = True) -> "LanguageModel":
    """Load by name, with the hint for a slow BLAS, and the ceiling measured beforehand."""
    from mlxquant.model.loading import load_folder
    from mlxquant.runtime.probe import measured
    from mlxquant.sources.names import resolve

    if hint := blas.hint():
        remark(hint)
    if probe:
        measured()
    with progress("importing, GB:", after=TIMEOUT_MAX) as advance:  # downloads have their own bars
        folder = resolve(model, revision=revision, progress=advance)
    with progress(f"loading {model}", after=2):
        return load_folder(folder, model, memory=memory, trust_remote_code=trust)


@contextmanager
def progress(title: str, after: float = 0.0) -> Iterator[Advance]:
    """A progress bar on stderr, where that is a terminal.

    The context gives a function of (done, total, value, part, left). A ``part`` of the work with
    another title gets a bar of its own. ``left`` is its remaining time in seconds, by default
    estimated from the time so far. The bar appears with the function's first call, or after
    ``after`` seconds.
    """
    from rich import progress as bars
    from rich.console import Console
    from rich.text import Text

    class TimeLeft(bars.ProgressColumn):
        """Counts down from the first step; rich's own column forgets steps of over 30 seconds."""

        def render(self, task: bars.Task) -> Text:
            if (until := task.fields["until"]) is None:
                return Text("-:--:--")
            return Text(str(timedelta(seconds=max(0, round(until - time.monotonic())))))

    console = Console(stderr=True)
    bar = bars.Progress(
        bars.TextColumn("{task.description}", markup=False), bars.BarColumn(),
        bars.MofNCompleteColumn(), TimeLeft(), console=console, transient=True,
        redirect_stdout=False, disable=not console.is_terminal)
    tasks = {title: bar.add_task(clean(title), total=None, until=None)}
    began, latest = dict[str, float](), time.monotonic()

    def advance(done: float, total: float, value: float | None, part: str = title,
                left: float | None = None) -> None:
        nonlocal latest
        start, latest = began.setdefault(part, latest), time.monotonic()
        if part not in tasks:
            tasks[part] = bar.add_task("", total=None, until=None)
        shown = part if value is None else f"{part} {value:.2f}"
        if left is None and done:
            left = (latest - start) * (total - done) / done
        bar.update(tasks[part], completed=done, total=total, description=clean(shown),
                   until=None if left is None else latest + left)
        bar.start()

    timer = Timer(after, bar.start)
    timer.start()
    try:
        yield advance
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def print_json(value: Any, indent: int | None = 2) -> None:
    """A result on stdout, exact in any encoding, on one line where ``indent`` is None; raises
    ``MlxquantError`` for NaN or infinity."""
    text = json_text(value, indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent) + "\n"
    print(text, end="", flush=True)


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
