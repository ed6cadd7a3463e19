"""What is asked of ``quantize``: everything that decides the bytes of a quantised checkpoint."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlxquant.base import checks
from mlxquant.base.errors import BadValue
from mlxquant.base.version import __version__
from mlxquant.codes.spec import Rule, Spec
from mlxquant.codes.width import Width
from mlxquant.layers.repeated import Repeat
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.quantise.calibration import SAMPLES, SEQUENCE_LENGTH, Calibration
from mlxquant.quantise.settings import BlockTuning

PROPAGATIONS = ("float", "quantised", "corrected")
EMBEDDING_BITS = tuple(width.value for width in Width if width is not Width.TERNARY)
# Blocks done, of how many, seconds so far, and in which stage ("weighing" or "quantising"); or
# steps done on a block, of how many, 100 × its error, and "tuning".
Progress = Callable[[int, int, float, str], None]


@dataclass(frozen=True)
class Text:
    """Calibration text: ``samples`` windows of ``length`` tokens from ``files`` (paths, or
    ``hf://datasets/OWNER/NAME/FILE``). Without files the model writes its own. ``conversations`` of
    the samples are talk that the model has with itself. Raises ``BadValue`` where there would be
    nothing to calibrate on, or nothing but conversations."""

    files: tuple[str, ...] = ()
    samples: int = SAMPLES
    length: int = SEQUENCE_LENGTH
    conversations: int = 0

    def __post_init__(self) -> None:
        checks.several("files", self.files)
        files = tuple(checks.path("a file of the text", file) for file in self.files)
        object.__setattr__(self, "files", files)
        checks.integer("samples", self.samples, 1)
        checks.integer("sequence length", self.length, 2)
        checks.integer("conversations", self.conversations, 0)
        if self.conversations >= self.samples:
            raise BadValue(f"conversations is {self.conversations}, allowed are fewer than the "
                           f"{self.samples} samples, among which they are")


@dataclass(frozen=True)
class Target:
    """A size to meet: bits per weight of the body, or gigabytes of the whole folder (10⁹ bytes).

    ``alike`` gives replicated siblings one width, and so one dispatch: faster, and a little worse.
    Raises ``BadValue`` unless exactly one size is given and positive.
    """

    bits_per_weight: float | None = None
    gigabytes: float | None = None
    alike: bool = False

    def __post_init__(self) -> None:
        given = [v for v in (self.bits_per_weight, self.gigabytes) if v is not None]
        if len(given) != 1 or not given[0] > 0:
            raise BadValue("a target is one positive number: bits per weight, or gigabytes")


@dataclass(frozen=True)
class Job:
    """How to quantise a model.

    ``spec`` applies to every layer, except where a rule of ``rules`` (glob over layer paths,
    changes of the spec; the first that matches wins) changes it. ``target`` instead gives every
    layer the width that keeps the model's predictions best within a size. ``propagation`` says
    which inputs a block is calibrated on: those in the ``float`` model, those behind ``quantised``
    blocks, or the latter with the weights ``corrected`` for the errors of earlier blocks.
    ``embedding_bits`` None keeps embedding and head as stored, unless a target in gigabytes chooses
    their width. ``activation`` rounds the inputs of all layers but experts as well, ``alpha`` is
    SmoothQuant's strength (None: searched). Blocks in ``repeats`` run more than once in the result,
    which changes nothing before their gates are tuned. ``tuning`` trains each block towards the
    float block's output once its codes are found. The same ``seed`` gives the same bytes. Raises
    ``BadValue`` for an impossible combination.
    """

    spec: Spec = field(default_factory=Spec)
    rules: tuple[Rule, ...] = ()
    text: Text = field(default_factory=Text)
    target: Target | None = None
    propagation: str = "quantised"
    embedding_bits: int | None = None
    activation: ActivationSpec | None = None
    alpha: float | None = None
    repeats: tuple[Repeat, ...] = ()
    seed: int = 0
    tuning: BlockTuning = field(default_factory=BlockTuning)

    def __post_init__(self) -> None:
        checks.kind("spec", self.spec, Spec)
        checks.kind("text", self.text, Text)
        checks.choice("propagation", self.propagation, PROPAGATIONS)
        if self.embedding_bits is not None:
            checks.choice("embedding_bits", self.embedding_bits, EMBEDDING_BITS)
        if self.alpha is not None:
            checks.number("alpha", self.alpha, 0, 1)
        methods = self._methods()
        if "replica" in methods and self.activation is not None:
            raise BadValue("replica does not quantise activations: leave --activation-bits out")
        if "smoothquant" in methods and self.activation is None:
            raise BadValue("smoothquant quantises activations too: give --activation-bits 8")

    def changed(self, **values: Any) -> "Job":
        """The job with fields of its own, of its spec, text or tuning changed, by their names."""
        spec, text, tuning = ({f.name: values.pop(f.name) for f in fields(kind) if f.name in values}
                      for kind in (Spec, Text, BlockTuning))
        return replace(self, spec=replace(self.spec, **spec), text=replace(self.text, **text),
                       tuning=replace(self.tuning, **tuning), **values)

    def ruled(self, path: str) -> Spec | None:
        """What the first rule that matches the layer at ``path`` makes of the spec, or None."""
        for glob, changes in self.rules:
            if fnmatchcase(path, glob):
                return replace(self.spec, **changes)
        return None

    @property
    def calibrated(self) -> bool:
        """Whether the job uses calibration text: plain rounding does not."""
        return (bool(self._methods() - {"rtn"}) or self.activation is not None
                or self.target is not None or self.tuning.tune_blocks is True)

    def tunes(self, specs: Iterable[Spec]) -> bool:
        """Whether a block whose layers are quantised so is to be trained."""
        asked = self.tuning.tune_blocks
        if asked is None:
            return self.activation is None and any(spec.bits.levels < 16 for spec in specs)
        return asked

    def _methods(self) -> set[str]:
        return {self.spec.method, *(changes.get("method", self.spec.method)
                                    for _, changes in self.rules)}

    def record(self, tokens: Calibration, base: dict[str, Any]) -> dict[str, Any]:
        """How the checkpoint is made of the model ``base``, for its config.json."""
        return {"version": __version__, **self.spec.as_dict(), "propagation": self.propagation,
                "overrides": [list(rule) for rule in self.rules],
                "activation": asdict(self.activation) if self.activation else None,
                "seed": self.seed, "base": base,
                "calibration": {"source": tokens.source, "samples": len(tokens.tokens),
                                "sequence_length": tokens.tokens.shape[1],
                                "digest": tokens.digest}}


@dataclass(frozen=True)
class Made:
    """The folder that ``quantize`` made, with the ``seconds`` and the ``peak_memory`` in bytes.

    ``added`` is the error of this quantisation on the calibration text, E‖(Ŵ − W) x‖² / E‖W x‖²,
    as the mean over layers and the largest. ``inherited`` is the record of rounding when a GGUF
    file was imported (``sources/gguf``), None for other models; the error of the file itself
    against its original is not known. ``notes`` say which layers were stored in another way than
    asked for, which blocks were left untuned, and why. ``profile`` are seconds and peaks by step,
    calibration text and budget too (``Profile.as_dict``). ``tuned`` are the errors of tuned blocks
    before and after (in ``nats`` where predictions are compared), and the share of codes that
    moved, by path.
    """

    folder: Path
    seconds: float
    peak_memory: int
    added: dict[str, Any]
    inherited: dict[str, Any] | None
    notes: tuple[str, ...] = ()
    profile: dict[str, Any] = field(default_factory=dict)
    tuned: dict[str, dict[str, float]] = field(default_factory=dict)
