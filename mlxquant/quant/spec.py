"""What was asked for: widths, groups and method, checked on construction."""

from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

from mlxquant.errors import BadValue

WIDTHS = (1, "ternary", 2, 3, 4, 5, 6, 8)
PLAIN_GROUPS = (32, 64, 128)  # those that MLX's own kernels have
METHODS = ("rtn", "gptq", "awq", "smoothquant")
ROTATIONS = (None, "online", "fused")


@dataclass(frozen=True)
class Spec:
    """How one matrix is quantised.

    ``bits`` is the width of a code (``"ternary"``: levels −1, 0, 1, stored in 2
    bits). ``group_size`` consecutive inputs share a scale and an offset; 0 means
    the whole row (per channel), −1 the whole matrix (per tensor). ``symmetric``
    levels mirror around zero. GPTQ takes the most active inputs first with
    ``act_order``, and improves its result in ``refine`` rounds (``quant/refine.py``).
    Raises ``BadValue`` for what is not allowed.
    """

    bits: int | str = 4
    group_size: int = 64
    symmetric: bool = False
    method: str = "gptq"
    act_order: bool = True
    refine: int = 3
    rotation: str | None = None

    def __post_init__(self):
        _check("bits", self.bits, WIDTHS)
        _check("method", self.method, METHODS)
        _check("rotation", self.rotation, ROTATIONS)
        if type(self.group_size) is not int or self.group_size < -1:
            raise BadValue(f"group_size is {self.group_size!r}, allowed are a positive number, "
                           "0 (per channel) and -1 (per tensor)")
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

    @property
    def plain(self) -> bool:
        """Whether stock mlx-lm can load the result: MLX's groups, no online transform."""
        return (self.group_size in PLAIN_GROUPS and self.rotation != "online"
                and self.method != "smoothquant")

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
             "method": str}
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
