"""What was asked for: widths, groups and method, checked on construction."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from mlxquant.base import checks
from mlxquant.base.errors import BadValue
from mlxquant.codes.width import Width

PLAIN_GROUPS = (32, 64, 128)  # those that MLX's own kernels have
METHODS = ("rtn", "gptq", "awq", "smoothquant", "replica")
ROTATIONS = (None, "online", "fused")
REPLICA_WIDTHS = (Width.ONE, Width.TERNARY, Width.TWO, Width.THREE, Width.FOUR)
REPLICA_GROUPS = (0, 8, 16, 32, 64)
MOST_REPLICAS = 16
ROTATION_BLOCKS = (0, *(1 << k for k in range(14)))


class Whole(Enum):
    """A group that is no number of inputs: a whole row (per channel) or the whole matrix (per
    tensor). ``value`` is how files and the command line write it."""

    ROW = 0
    MATRIX = -1


def group_size_of(value: object) -> int | Whole:
    """The group size that files write as ``value``, as ``Spec`` has it; raises ``BadValue``."""
    if isinstance(value, Whole):
        return value
    if type(value) is not int or value < -1:
        raise BadValue(f"group_size is {value!r}, allowed are a positive number, "
                       "0 (per channel) and -1 (per tensor)")
    return value if value > 0 else Whole(value)


class _Recorded:
    """A dataclass whose fields are written to files."""

    def as_dict(self: Any) -> dict[str, Any]:
        """The fields by name, widths and whole groups as files write them."""
        return {name: value.value if isinstance(value, Enum) else value
                for name, value in asdict(self).items()}


@dataclass(frozen=True)
class ReplicaShape(_Recorded):
    """What sibling layers (they read one input) share: width of a code, replicas K, inputs per
    group G (0: no groups), and block of the rotation (0: none). ``bits`` may be given as JSON has
    it. Raises ``BadValue`` for a value that is not allowed."""

    bits: Width = Width.TWO
    replicas: int = 4
    replica_group: int = 0
    rotation_block: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", Width.of(self.bits, REPLICA_WIDTHS))
        checks.choice("replicas", self.replicas, range(1, MOST_REPLICAS + 1))
        checks.choice("replica_group", self.replica_group, REPLICA_GROUPS)
        checks.choice("rotation_block", self.rotation_block, ROTATION_BLOCKS)

    def check_inputs(self, inputs: int, path: str) -> None:
        """Raises ``BadValue`` unless group and rotation block divide the ``inputs`` of ``path``."""
        for name, sizes in (("replica_group", REPLICA_GROUPS), ("rotation_block", ROTATION_BLOCKS)):
            size = getattr(self, name)
            if size and inputs % size:
                fitting = [s for s in sizes if not s or inputs % s == 0]
                raise BadValue(f"{name} {size} does not divide the {inputs} inputs of {path}; "
                               f"allowed are {', '.join(map(str, fitting))}")

    def multiply_adds(self, weights: int) -> int:
        """Multiply-adds for one token: K per weight, grouped 1 + K / G."""
        if not self.replica_group:
            return weights * self.replicas
        return weights + weights * self.replicas // self.replica_group

    def rotation_additions(self, inputs: int) -> int:
        """Additions that rotate one token's ``inputs``: n·log₂(block)."""
        return inputs * max(self.rotation_block.bit_length() - 1, 0)


@dataclass(frozen=True)
class Spec(_Recorded):
    """How one matrix is quantised.

    ``bits`` is the width of a code. ``group_size`` consecutive inputs share a scale and an
    offset, or a ``Whole`` row or matrix does; both may be given as JSON has them. ``symmetric``
    levels mirror around zero. GPTQ takes the most active inputs first with ``act_order``, and
    improves its result in ``refine`` rounds (``quantise/refine.py``). The method ``replica`` has
    no groups; it has ``replicas`` scalings, whose input side is constant over ``replica_group``
    inputs (0: one value per input). Raises ``BadValue`` for a value that is not allowed.
    """

    bits: Width = Width.FOUR
    group_size: int | Whole = 64
    symmetric: bool = False
    method: str = "gptq"
    act_order: bool = True
    refine: int = 3
    rotation: str | None = None
    replicas: int = 4
    replica_group: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", Width.of(self.bits))
        object.__setattr__(self, "group_size", group_size_of(self.group_size))
        checks.choice("method", self.method, METHODS)
        checks.choice("rotation", self.rotation, ROTATIONS)
        if self.method == "replica":
            self.replica_shape(64)
        checks.integer("refine", self.refine, 0, 100)

    @property
    def mirrored(self) -> bool:
        """Whether levels are symmetric around zero, so that the bias follows from the scale."""
        return self.symmetric or self.bits is Width.TERNARY

    def group_for(self, columns: int) -> int:
        """Inputs of a group in rows of ``columns``; raises ``BadValue`` if it does not divide."""
        group = columns if isinstance(self.group_size, Whole) else self.group_size
        if columns % group:
            fitting = [g for g in (16, 32, 64, 96, 128, 192, 256) if columns % g == 0]
            raise BadValue(f"group_size {group} does not divide the {columns} inputs; "
                           f"sizes that do: {', '.join(map(str, fitting)) or columns}")
        return group

    def replica_shape(self, rotation_block: int) -> ReplicaShape:
        """The shape of a replicated layer of this spec; raises ``BadValue`` as ``ReplicaShape``."""
        return ReplicaShape(self.bits, self.replicas, self.replica_group,
                            rotation_block if self.rotation == "online" else 0)


Rule = tuple[str, dict[str, Any]]  # a glob over layer paths, and what it changes in the spec


def parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """``'GLOB:bits=4,group_size=64'`` as (glob, changes for JSON); raises ``BadValue``."""
    glob, _, body = text.partition(":")
    kinds: dict[str, Callable[[str], Any]] = {
        "bits": lambda v: Width.of(v).value, "group_size": int, "method": str, "replicas": int,
        "replica_group": int, "symmetric": lambda v: {"true": True, "false": False}[v.lower()]}
    changes = {}
    try:
        for part in body.split(","):
            key, _, value = part.partition("=")
            changes[key.strip()] = kinds[key.strip()](value.strip())
        Spec(**changes)
    except (KeyError, ValueError) as error:
        raise BadValue(f"override {text!r}: write GLOB:bits=4,group_size=64 "
                       f"(keys: {', '.join(kinds)}, which is true or false)") from error
    return glob, changes
