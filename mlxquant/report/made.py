"""Compare a quantised model with its original on held-out text."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mlxquant.base import checks
from mlxquant.base.errors import BadValue, MlxquantError, TooLarge
from mlxquant.model.loading import load, open_tokenizer
from mlxquant.model.windows import read_text
from mlxquant.quantise.self_written import self_written
from mlxquant.report.divergence import divergence
from mlxquant.report.perplexity import Perplexity, Progress, evaluate
from mlxquant.sources.checkpoint import read_config
from mlxquant.sources.names import resolve

SELF = "self"  # in place of a file: text that the original writes


def check_apart(text: str | Path, calibration: Iterable[str]) -> None:
    """Raise ``BadValue`` where the file ``text`` is one of the ``calibration`` files."""
    if any(Path(name).exists() and Path(name).samefile(text) for name in calibration):
        raise BadValue(f"{text} is the calibration text; what is measured must be another")


@dataclass(frozen=True)
class HeldOut:
    """The first ``windows`` of ``length`` tokens of the file ``text``; or, where that is ``SELF``,
    as many samples that the original writes with ``seed``, which must differ from the seed of the
    calibration text."""

    text: str
    windows: int
    length: int
    seed: int

    def check(self, original: str, calibration: list[str], revision: str | None = None) -> None:
        """Raise ``BadValue`` or ``MlxquantError`` for a text that cannot serve."""
        checks.integer("windows", self.windows, 1)
        checks.integer("sequence length", self.length, 2)
        if self.text == SELF:
            return
        if not Path(self.text).is_file():
            raise MlxquantError(f"no such file: {self.text}")
        check_apart(self.text, calibration)
        folder = resolve(original, revision=revision)
        tokenizer = open_tokenizer(folder, read_config(folder))
        tokens = len(tokenizer.encode(read_text(self.text), add_special_tokens=False,
                                      verbose=False))
        if tokens < self.windows * self.length:
            raise BadValue(f"{self.text} has {tokens} tokens, {self.windows} windows of "
                           f"{self.length} need {self.windows * self.length}")

    def measure(self, folder: Path, original: str, revision: str | None = None,
                writing: Callable[[int, int], None] = lambda *_: None,
                progress: Progress = lambda *_: None) -> Perplexity:
        """The ``Divergence`` of the model in ``folder`` from ``original``; only its perplexity
        where the original is too large to load, unless the original is to write the text.
        ``writing`` gets the number of samples written and of all."""
        made = load(str(folder))
        try:
            reference = load(original, revision=revision)
        except TooLarge:
            if self.text == SELF:
                raise
            return evaluate(made, Path(self.text), context=self.length, windows=self.windows,
                            progress=progress)
        if self.text != SELF:
            return divergence(made, reference, Path(self.text), context=self.length,
                              windows=self.windows, progress=progress)
        rows = self_written(reference, self.windows, self.length, self.seed, progress=writing)
        text = reference.tokenizer.decode(rows.tokens.flatten().tolist(), skip_special_tokens=True)
        return divergence(made, reference, text, context=self.length, progress=progress)
