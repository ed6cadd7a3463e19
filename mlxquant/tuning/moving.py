"""A replicated layer whose codes may move in training: learned rounding.

As in AdaRound (Nagel et al. 2020, https://arxiv.org/abs/2004.10568) a code may end at another
level than the nearest; as in LSQ (Esser et al. 2019, https://arxiv.org/abs/1902.08153) the
gradient passes straight through the rounding. Every code starts where the sweep left it, in
the middle of its cell: started from the float weights it ended worse (``benchmarks/LOG.md``).
"""

import mlx.core as mx
import mlx.nn as nn

from mlxquant.layers.replicated import ReplicatedLinear
from mlxquant.quant.packing import level_count, level_grid, pack_codes, unpack_codes


class MovingCodes(nn.Module):
    """Takes the place of a ``ReplicatedLinear`` and keeps its parameters' names but for the codes.

    ``moves`` (m, n), zero at first, are how many levels a code has moved before rounding;
    beyond the lowest and the highest level they have no gradient.
    """

    def __init__(self, layer: ReplicatedLinear):
        super().__init__()
        object.__setattr__(self, "_input", layer.input)  # its parameters are those of the group alone
        self.replica_out = layer.replica_out
        if "bias" in layer:
            self.bias = layer.bias
        bits = layer.input.spec.bits
        self._grid = level_grid(bits)
        self._top = level_count(bits) - 1
        self._codes = unpack_codes(layer.codes, bits, layer.shape[1])
        self.moves = mx.zeros(layer.shape)
        self.freeze(recurse=False, keys="moves")  # trained by ``Trainable``, never by itself

    def packed(self, moves: mx.array) -> mx.array:
        """The codes that ``moves`` (m, n) stand for, as a checkpoint holds them."""
        codes = mx.clip(mx.round(self._codes + moves), 0, self._top)
        return pack_codes(codes.astype(mx.uint8), self._input.spec.bits)

    def __call__(self, x: mx.array) -> mx.array:
        lowest, distance = self._grid
        wanted = mx.clip(self._codes + self.moves.astype(mx.float32), 0, self._top)
        codes = wanted + mx.stop_gradient(mx.round(wanted) - wanted)
        scales = self.replica_out.astype(x.dtype) @ self._input.envelope(x.dtype).T
        y = self._input.rotate(x, self) @ ((lowest + distance * codes).astype(x.dtype) * scales).T
        return y + self.bias.astype(x.dtype) if "bias" in self else y
