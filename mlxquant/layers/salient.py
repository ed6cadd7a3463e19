"""A linear layer with a few input channels at higher precision than its codes.

AWQ (https://arxiv.org/abs/2306.00978, section 3.1) finds that a hundredth of the
channels in 16 bits removes most of what rounding costs; OWQ
(https://arxiv.org/abs/2306.02272) keeps such weak columns for good, and
LLM.int8 (https://arxiv.org/abs/2208.07339) those with outlying activations.

Cutting columns out would break MLX's groups, so their codes stay in place and
what is kept is the residual over them: a second product, k columns wide.
``quantise/salient.py`` chooses the columns and computes the residual.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxquant.base.errors import BadCheckpoint, BadValue, Unsupported
from mlxquant.layers.grouped import GroupedLinear


class SalientLinear(nn.Module):
    """y = linear(x) + x[…, columns] residualᵀ.

    ``linear`` is a ``Linear``, ``QuantizedLinear`` or ``GroupedLinear`` (m, n), with any
    bias; ``columns`` are k different inputs, 1 ≤ k ≤ n, and ``residual`` (m, k) is what
    their weights have beyond those of ``linear``. They are the parameters
    ``salient_columns``, uint16 up to 65536 inputs and int32 above, and
    ``salient_weight``, in the type that is given.

    Inside a ``TransformedLinear`` the columns are those of the transformed input. After
    a rotation no channel stands out and little is gained; where activations are
    rounded, so are those of kept columns, unlike in LLM.int8.

    Raises ``BadValue`` for shapes and columns that do not fit and ``Unsupported`` for
    another kind of inner layer.
    """

    def __init__(self, linear: nn.Module, columns: np.ndarray | mx.array, residual: mx.array):
        super().__init__()
        outputs, inputs = _shape(linear)
        columns = np.asarray(columns)
        _check_count(columns.size, inputs)
        if not _are_columns(columns, inputs):
            raise BadValue(f"salient columns are {columns.tolist()}, allowed are different integers "
                           f"from 0 to {inputs - 1} in one row")
        if residual.shape != (outputs, len(columns)):
            raise BadValue(f"the residual of salient columns has shape {residual.shape}, "
                           f"allowed is ({outputs}, {len(columns)})")
        self.linear = linear
        self.salient_columns = mx.array(columns.astype(np.uint16 if inputs <= 1 << 16 else np.int32))
        self.salient_weight = residual
        self.freeze(recurse=False, keys="salient_columns")  # indices have no gradient

    @classmethod
    def from_config(cls, inner: nn.Module, entry: dict) -> "SalientLinear":
        """The layer that ``entry``, from ``describe``, stands for, around ``inner``.

        Its parameters have the right shapes, to be loaded by name; until then the
        residual is zero. Raises ``BadValue`` or ``Unsupported`` for an entry that makes
        no layer.
        """
        if not isinstance(entry, dict) or entry.keys() != {"columns"}:
            raise Unsupported(f"salient channels {entry!r} are not known; the only key is columns")
        count = entry["columns"]
        outputs, inputs = _shape(inner)
        _check_count(count, inputs)
        return cls(inner, np.arange(count), mx.zeros((outputs, count)))

    def describe(self) -> dict:
        """What ``from_config`` needs beside the parameters, for JSON."""
        return {"columns": len(self.salient_columns)}

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return _shape(self.linear)

    @property
    def stored_bytes(self) -> int:
        """Bytes of columns and residual, as held: what this layer adds to its inner one."""
        return self.salient_columns.nbytes + self.salient_weight.nbytes

    def expanded(self, weight: mx.array) -> mx.array:
        """The whole weight (m, n), in the dtype of ``weight`` (m, n), the inner layer's expanded."""
        return weight.at[:, self.salient_columns].add(self.salient_weight.astype(weight.dtype))

    def check_loaded(self, path: str) -> None:
        """Raises ``BadCheckpoint`` where columns that were loaded are no inputs of the layer:
        MLX would read past the end of x."""
        if not _are_columns(np.array(self.salient_columns), self.shape[1]):
            raise BadCheckpoint(f"{path}.salient_columns are not different inputs from 0 to "
                                f"{self.shape[1] - 1}")

    def __call__(self, x: mx.array) -> mx.array:
        salient = mx.take(x, self.salient_columns, axis=-1)
        return self.linear(x) + salient @ self.salient_weight.astype(x.dtype).T


def expand_salient(network: nn.Module) -> nn.Module:
    """Replace every salient layer around a dense one by one dense layer, in place; others stay.

    Raises ``BadCheckpoint`` for columns out of range, in those that stay too.
    """
    made = []
    for path, module in network.named_modules():
        if isinstance(module, SalientLinear):
            module.check_loaded(path)
            if isinstance(module.linear, nn.Linear):
                module.linear.weight = module.expanded(module.linear.weight)
                made.append((path, module.linear))
    network.update_modules(tree_unflatten(made))
    return network


def _shape(linear: nn.Module) -> tuple[int, int]:
    if isinstance(linear, nn.QuantizedLinear):
        return linear.weight.shape[0], linear.weight.shape[1] * 32 // linear.bits
    if isinstance(linear, nn.Linear):
        return linear.weight.shape
    if isinstance(linear, GroupedLinear):
        return linear.shape
    raise Unsupported(f"salient channels cannot be kept beside {type(linear).__name__}; "
                      "they can beside Linear, QuantizedLinear and GroupedLinear")


def _check_count(count: int, inputs: int) -> None:
    if type(count) is not int or not 1 <= count <= inputs:
        raise BadValue(f"salient columns number {count!r}, allowed are 1 to {inputs}")


def _are_columns(columns: np.ndarray, inputs: int) -> bool:
    return (columns.ndim == 1 and np.issubdtype(columns.dtype, np.integer)
            and len(np.unique(columns)) == len(columns)
            and columns.min() >= 0 and columns.max() < inputs)
