"""Everything that decides the bytes of a quantised checkpoint, and what making it took."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mlxquant.base.errors import BadValue
from mlxquant.base.version import __version__
from mlxquant.codes.spec import Overrides, Spec
from mlxquant.layers.repeated import Repeat
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.quantise.calibration import Calibration

PROPAGATIONS = ("float", "quantised", "corrected")
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of the result.

    ``propagation`` says whose inputs a block is calibrated on: the ``float``
    model's, the ``quantised`` prefix's, or those with the target ``corrected``
    for the error already made. ``embedding_bits`` None keeps embedding and head
    as stored. ``activation`` quantises the inputs of all layers as well. ``repeats``
    are the blocks that run more than once in the result; with their gates at 0 they
    change nothing, so the blocks themselves are quantised without them. ``base`` says of
    which model this is the job, for the card.
    """

    overrides: Overrides
    propagation: str = "quantised"
    embedding_bits: int | None = None
    activation: ActivationSpec | None = None
    alpha: float | None = None
    seed: int = 0
    repeats: tuple[Repeat, ...] = ()
    base: dict | None = None

    def __post_init__(self):
        if self.propagation not in PROPAGATIONS:
            raise BadValue(f"propagation is {self.propagation!r}, allowed are {', '.join(PROPAGATIONS)}")
        methods = self._methods()
        if "replica" in methods and self.activation is not None:
            raise BadValue("replica does not quantise activations: leave --activation-bits out")
        if "smoothquant" in methods and self.activation is None:
            raise BadValue("smoothquant quantises activations too: give --activation-bits 8")

    @property
    def calibrated(self) -> bool:
        """Whether the data plays a part: rounding alone looks at nothing."""
        return bool(self._methods() - {"rtn"}) or self.activation is not None

    def _methods(self) -> set[str]:
        return {self.spec.method, *(changes.get("method", self.spec.method) for _, changes in self.overrides.rules)}

    @property
    def spec(self) -> Spec:
        return self.overrides.default


@dataclass(frozen=True)
class Outcome:
    """Where the result is, and what making it took (seconds, bytes).

    ``added`` is the error of this quantisation on the calibration text, E‖(Ŵ − W) x‖² / E‖W x‖², as the mean over
    layers and the largest. ``inherited`` is what importing a GGUF file took before (``gguf.model.Imported.record``),
    None where the model was no such file; what the file itself lost of its original cannot be known from it.
    """

    folder: Path
    seconds: float
    peak_memory: int
    added: dict
    inherited: dict | None


def record(job: Job, tokens: Calibration) -> dict:
    """How the checkpoint was made, for its config.json."""
    return {"version": __version__, **job.spec.as_dict(), "propagation": job.propagation,
            "overrides": [list(rule) for rule in job.overrides.rules],
            "activation": asdict(job.activation) if job.activation else None, "seed": job.seed, "base": job.base,
            "calibration": {"source": tokens.source, "samples": len(tokens.tokens),
                            "sequence_length": tokens.tokens.shape[1], "digest": tokens.digest}}
