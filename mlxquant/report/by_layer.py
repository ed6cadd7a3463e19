"""Where in the network the error arises: hidden states after every block, beside the original's.

Both models read the same token windows as for perplexity; what the tokenizer puts before the text
(BOS) is read and not compared. After each block the hidden state h of the reference and h_q of the
model are compared by ‖h_q − h‖ / ‖h‖: once with Frobenius norms over all positions of all windows,
and once position by position. The two part where one position outweighs the rest, as a first token
does with its massive activations in the middle of most networks (Sun et al., arXiv 2402.17762); the
second then tells of the others.

Kurtosis over the channels shows how much of a state sits in few of them: 3 for normally distributed
values, near the number of channels where a single one carries everything (Elhage et al.,
"Privileged bases in the transformer residual stream", 2023).
"""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.base.errors import BadValue
from mlxquant.model.blocks import after_each_block
from mlxquant.model.loading import LanguageModel
from mlxquant.report.divergence import paired_windows
from mlxquant.report.figure import figure
from mlxquant.report.perplexity import Progress

_CHANNELS = 3  # the largest ones, reported for each block


@dataclass(frozen=True)
class Channel:
    """One channel of the hidden state and its largest absolute value over all positions."""

    index: int
    max_abs: float


@dataclass(frozen=True)
class LayerError:
    """The hidden state after one block; ``layer`` counts from 0.

    ``position_error`` is the mean over positions of each one's relative error, and ``kurtosis``
    is a mean over positions too; ``largest_channels`` come largest first. ``reference_`` marks
    what belongs to the original.
    """

    layer: int
    relative_error: float
    position_error: float
    kurtosis: float
    reference_kurtosis: float
    largest_channels: list[Channel]
    reference_largest_channels: list[Channel]


def by_layer(model: LanguageModel, reference: LanguageModel, text: str | Path, *,
             context: int = 1024, windows: int | None = None,
             progress: Progress = lambda *_: None) -> list[LayerError]:
    """Compare the hidden states of two models after every block, on the windows of a text.

    ``progress`` is called after each window with (done, total, relative error after the last
    block so far). Both models' states are held for one window at a time. Raises what
    ``divergence`` does, and ``BadValue`` for networks of different depth or width.
    """
    batches = paired_windows(model, reference, text, context, windows)
    layers: list[_Sums] = []
    for done, window in enumerate(batches, 1):
        states, original = (hidden_states(x.network, window.tokens) for x in (model, reference))
        if [x.shape for x in states] != [x.shape for x in original]:
            depth, width, theirs, other = (value for x in (states, original)
                                           for value in (len(x), x[0].shape[-1]))
            raise BadValue(f"{model.name} has {depth} blocks of width {width}, {reference.name} "
                           f"has {theirs} of width {other}; they must be the same")
        layers = layers or [_Sums() for _ in states]
        for sums, *pair in zip(layers, states, original):
            sums.add(*(state[..., window.lead:, :].astype(mx.float32) for state in pair))
        del states, original, pair
        progress(done, len(batches), layers[-1].relative_error)
    return [sums.result(index) for index, sums in enumerate(layers)]


def hidden_states(network: nn.Module, window: mx.array) -> list[mx.array]:
    """The states after each block for a window of shape (1, context), in the order of running.

    Each is of shape (1, context − 1, channels), in the network's own precision. The head is
    not run. Raises ``Unsupported`` for an architecture whose blocks cannot be observed.
    """
    states: list[mx.array] = []

    def record(state: mx.array) -> mx.array:
        states.append(state)
        return state

    with after_each_block(network, record):
        network(window[:, :-1])
    mx.eval(states)
    return states


def plot(layers: list[LayerError], path: str | Path) -> None:
    """Draw relative error and kurtosis over depth into ``path``, a PNG or SVG file by its name."""
    from matplotlib.ticker import MaxNLocator  # slow to import

    depth = [layer.layer for layer in layers]
    with figure(path, (8, 6), rows=2) as (distance, kurtosis):
        distance.plot(depth, [layer.relative_error for layer in layers], ".-", color="tab:red",
                      label="all positions together")
        distance.plot(depth, [layer.position_error for layer in layers], ".:", color="tab:blue",
                      label="mean over positions")
        distance.set(ylabel="relative error of the hidden state", ylim=(0, None))
        kurtosis.semilogy(depth, [layer.reference_kurtosis for layer in layers], ".-",
                          color="tab:gray", label="reference")
        kurtosis.semilogy(depth, [layer.kurtosis for layer in layers], ".--", color="tab:red",
                          label="model")
        kurtosis.set(xlabel="after block", ylabel="kurtosis over channels")
        kurtosis.xaxis.set_major_locator(MaxNLocator(integer=True))


def table(layers: list[LayerError]) -> list[list[str]]:
    """The layers as text for a table of at most 80 columns, its head first."""
    def largest(channels: list[Channel]) -> str:  # of three: all would not fit
        return f"{channels[0].index}: {channels[0].max_abs:.3g}"

    return [["block", "error", "by position", "kurtosis", "reference", "largest", "reference"], *(
        [str(layer.layer), f"{100 * layer.relative_error:.2f} %",
         f"{100 * layer.position_error:.2f} %", f"{layer.kurtosis:.4g}",
         f"{layer.reference_kurtosis:.4g}", largest(layer.largest_channels),
         largest(layer.reference_largest_channels)] for layer in layers)]


class _Sums:
    """What is added up for one block over the windows: index 0 the model's, 1 the reference's."""

    def __init__(self) -> None:
        self.error = self.norm = self.position_error = 0.0
        self.kurtosis, self.largest = np.zeros(2), [np.zeros(1), np.zeros(1)]
        self.windows = 0

    def add(self, state: mx.array, reference: mx.array) -> None:
        error = mx.square(state - reference).sum(axis=-1)
        norm = mx.square(reference).sum(axis=-1)
        self.error += error.sum().item()
        self.norm += norm.sum().item()
        self.position_error += mx.sqrt(error / norm).mean().item()
        for side, h in enumerate((state, reference)):
            self.kurtosis[side] += _kurtosis(h).mean().item()
            peak = np.array(mx.abs(h).max(axis=tuple(range(h.ndim - 1))))
            self.largest[side] = np.maximum(self.largest[side], peak)
        self.windows += 1

    @property
    def relative_error(self) -> float:
        return (self.error / self.norm) ** 0.5

    def result(self, index: int) -> LayerError:
        return LayerError(index, self.relative_error, self.position_error / self.windows,
                          *(self.kurtosis / self.windows).tolist(),
                          *map(_largest_channels, self.largest))


def _kurtosis(h: mx.array) -> mx.array:
    """E[(x − μ)⁴] / σ⁴ over the last axis: shape (…, channels) gives (…)."""
    centred = h - h.mean(axis=-1, keepdims=True)
    # Scaled before the fourth power, which would overflow float32 where one channel is huge.
    scale = mx.rsqrt(mx.maximum(mx.square(centred).mean(axis=-1, keepdims=True), 1e-30))
    return mx.square(mx.square(centred * scale)).mean(axis=-1)


def _largest_channels(peak: np.ndarray) -> list[Channel]:
    order = np.argsort(-peak, kind="stable")[:_CHANNELS]
    return [Channel(int(index), float(peak[index])) for index in order]
