"""What was asked for: widths, groups and method, checked on construction."""

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from mlxquant.base.errors import BadValue

WIDTHS = (1, "ternary", 2, 3, 4, 5, 6, 8)
PLAIN_GROUPS = (32, 64, 128)  # those that MLX's own kernels have
METHODS = ("rtn", "gptq", "awq", "smoothquant", "replica")
ROTATIONS = (None, "online", "fused")
REPLICA_WIDTHS = (1, "ternary", 2, 3, 4)
REPLICA_GROUPS = (0, 8, 16, 32, 64)
MOST_REPLICAS = 16
ROTATION_BLOCKS = (0, *(1 << k for k in range(14)))


@dataclass(frozen=True)
class ReplicaShape:
    """What siblings have in common: width of a code, replicas K, inputs per group G (0: plain),
    and block of the rotation (0: none). Raises ``BadValue`` for what is not allowed."""

    bits: int | str = 2
    replicas: int = 4
    replica_group: int = 0
    rotation_block: int = 0

    def __post_init__(self):
        for name, allowed in (("bits", REPLICA_WIDTHS), ("replicas", range(1, MOST_REPLICAS + 1)),
                              ("replica_group", REPLICA_GROUPS), ("rotation_block", ROTATION_BLOCKS)):
            value = getattr(self, name)
            if type(value) not in (int, str) or value not in allowed:
                raise BadValue(f"{name} is {value!r}, allowed are {', '.join(map(str, allowed))}")

    def check(self, inputs: int, path: str) -> None:
        """Raises ``BadValue`` unless group and rotation block divide the ``inputs`` of ``path``."""
        for name, sizes in (("replica_group", REPLICA_GROUPS), ("rotation_block", ROTATION_BLOCKS)):
            size = getattr(self, name)
            if size and inputs % size:
                fitting = [s for s in sizes if not s or inputs % s == 0]
                raise BadValue(f"{name} {size} does not divide the {inputs} inputs of {path}; "
                               f"allowed are {', '.join(map(str, fitting))}")

    def multiply_adds(self, weights: int) -> int:
        """What one token costs: K per weight, grouped 1 + K / G."""
        if not self.replica_group:
            return weights * self.replicas
        return weights + weights * self.replicas // self.replica_group

    def rotation_additions(self, inputs: int) -> int:
        """What rotating one token's ``inputs`` costs: n·log₂(block)."""
        return inputs * max(self.rotation_block.bit_length() - 1, 0)

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Spec:
    """How one matrix is quantised.

    ``bits`` is the width of a code (``"ternary"``: levels −1, 0, 1, stored in 2
    bits). ``group_size`` consecutive inputs share a scale and an offset; 0 means
    the whole row (per channel), −1 the whole matrix (per tensor). ``symmetric``
    levels mirror around zero. GPTQ takes the most active inputs first with
    ``act_order``, and improves its result in ``refine`` rounds (``quantise/refine.py``).
    The method ``replica`` has no groups but ``replicas`` scalings, their inputs' side constant
    over ``replica_group`` inputs (0: none). ``salient`` is the share of inputs that keep 16
    bits (``quantise/salient.py``). Raises ``BadValue`` for what is not allowed.
    """

    bits: int | str = 4
    group_size: int = 64
    symmetric: bool = False
    method: str = "gptq"
    act_order: bool = True
    refine: int = 3
    rotation: str | None = None
    replicas: int = 4
    replica_group: int = 0
    salient: float = 0.0

    def __post_init__(self):
        _check("bits", self.bits, WIDTHS)
        _check("method", self.method, METHODS)
        _check("rotation", self.rotation, ROTATIONS)
        if type(self.group_size) is not int or self.group_size < -1:
            raise BadValue(f"group_size is {self.group_size!r}, allowed are a positive number, "
                           "0 (per channel) and -1 (per tensor)")
        if self.method == "replica":
            self.replica_shape(64)
        if not 0 <= self.salient <= 0.5 or (self.salient and self.method == "replica"):
            raise BadValue(f"salient is {self.salient!r} with {self.method}, allowed are shares of inputs "
                           "from 0 to 0.5, and 0 with replica")
        if type(self.refine) is not int or not 0 <= self.refine <= 100:
            raise BadValue(f"refine is {self.refine!r}, allowed are 0 to 100 rounds")

    @property
    def levels(self) -> int:
        """Number of values a code can take."""
        return 3 if self.bits == "ternary" else 2 ** self.bits

    @property
    def mirrored(self) -> bool:
        """Whether a bias follows from its scale, levels being as far below zero as above."""
        return self.symmetric or self.bits == "ternary"

    @property
    def code_bits(self) -> int:
        """Bits that one code takes in memory."""
        return 2 if self.bits == "ternary" else self.bits

    def group_for(self, columns: int, path: str = "the matrix") -> int:
        """Group size in inputs for rows of ``columns``; raises ``BadValue`` if it does not divide."""
        group = self.group_size if self.group_size > 0 else columns
        if columns % group:
            fitting = [g for g in (16, 32, 64, 96, 128, 192, 256) if columns % g == 0]
            raise BadValue(f"group_size {group} does not divide the {columns} inputs of {path}; "
                           f"sizes that do: {', '.join(map(str, fitting)) or columns}")
        return group

    def salient_count(self, columns: int) -> int:
        """How many of ``columns`` inputs keep 16 bits."""
        return max(1, round(self.salient * columns)) if self.salient else 0

    def check(self, columns: int, path: str) -> None:
        """Raise ``BadValue`` unless groups or replicas divide the ``columns`` inputs of ``path``."""
        if self.method == "replica":
            self.replica_shape(0).check(columns, path)
            groups = columns // (self.replica_group or 1)
            if self.replicas > groups:  # they would say the same thing twice
                raise BadValue(f"{self.replicas} replicas are more than the {groups} groups of {path}; "
                               f"allowed are 1 to {groups}")
        else:
            self.group_for(columns, path)

    def replica_shape(self, rotation_block: int) -> ReplicaShape:
        """What a replicated layer of this spec stores; raises ``BadValue`` for what is not allowed."""
        return ReplicaShape(self.bits, self.replicas, self.replica_group,
                            rotation_block if self.rotation == "online" else 0)

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Overrides:
    """Specs by layer path: the first glob that matches wins, else the default."""

    default: Spec
    rules: tuple[tuple[str, dict], ...] = ()

    def spec_for(self, path: str) -> Spec:
        for glob, changes in self.rules:
            if fnmatchcase(path, glob):
                return Spec(**{**asdict(self.default), **changes})
        return self.default


def parse_override(text: str) -> tuple[str, dict]:
    """``'GLOB:bits=4,group_size=64'`` as (glob, changes); raises ``BadValue``."""
    glob, _, body = text.partition(":")
    kinds = {"bits": parse_bits, "group_size": int, "symmetric": lambda v: v.lower() == "true",
             "method": str, "replicas": int, "replica_group": int}
    changes = {}
    try:
        for part in body.split(","):
            key, _, value = part.partition("=")
            changes[key.strip()] = kinds[key.strip()](value.strip())
        Spec(**changes)
    except (KeyError, ValueError) as error:
        raise BadValue(f"override {text!r}: write GLOB:bits=4,group_size=64 "
                       f"(keys: {', '.join(kinds)})") from error
    return glob, changes


def parse_bits(text: str) -> int | str:
    """A width from the command line; raises ``BadValue``."""
    value = int(text) if text.isdecimal() else text
    _check("bits", value, WIDTHS)
    return value


def _check(name: str, value, allowed: tuple) -> None:
    if value not in allowed or isinstance(value, bool):
        raise BadValue(f"{name} is {value!r}, allowed are {', '.join(map(str, allowed))}")
