"""Where in the network the error arises: hidden states after every block, beside the original's.

Both models read the same token windows as for perplexity; what the tokenizer puts before the text
(BOS) is read and not compared. After each block the hidden state h of the reference and h_q of the
model are compared by ‖h_q − h‖ / ‖h‖: once with Frobenius norms over all positions of all windows,
and once position by position. The two part where one position outweighs the rest, as a first token
does with its massive activations in the middle of most networks (Sun et al., arXiv 2402.17762).

Kurtosis over the channels shows how much of a state sits in few of them: 3 for normally distributed
values, near the number of channels where a single one carries everything (Elhage et al.,
"Privileged bases in the transformer residual stream", 2023).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.base.errors import BadValue
from mlxquant.layers.hooks import after_each_block
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

    ``position_error`` and ``kurtosis`` are means over positions; ``largest_channels`` come largest
    first. ``reference_`` marks what belongs to the original.
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
    sums: Any = 0.0  # (layers, 5)
    peaks: Any = 0.0  # (layers, 2, channels)
    for done, window in enumerate(batches, 1):
        states, original = (hidden_states(x.network, window.tokens) for x in (model, reference))
        if [x.shape for x in states] != [x.shape for x in original]:
            raise BadValue(f"{model.name} has {len(states)} blocks of width {states[0].shape[-1]}, "
                           f"{reference.name} has {len(original)} of width "
                           f"{original[0].shape[-1]}; they must be the same")
        found = [_compared(*(x[..., window.lead:, :].astype(mx.float32) for x in pair))
                 for pair in zip(states, original)]
        del states, original
        sums = sums + np.array([numbers for numbers, _ in found])
        peaks = np.maximum(peaks, [largest for _, largest in found])
        progress(done, len(batches), float(sums[-1, 0] / sums[-1, 1]) ** 0.5)
    return [LayerError(index, (error / norm) ** 0.5, *(x / len(batches) for x in means),
                       *map(_largest_channels, largest))
            for index, ((error, norm, *means), largest) in enumerate(zip(sums.tolist(), peaks))]


def hidden_states(network: nn.Module, window: mx.array) -> list[mx.array]:
    """The states after each block for a window of shape (1, context), in the order of running.

    Each is of shape (1, context − 1, channels), in the network's own precision. Raises
    ``Unsupported`` for an architecture whose blocks cannot be observed.
    """
    states: list[mx.array] = []

    def record(state: mx.array) -> mx.array:
        states.append(state)
        return state

    with after_each_block(network, record):
        network(window[:, :-1])
    mx.eval(states)  # and so the head is not run
    return states


def _compared(state: mx.array, reference: mx.array) -> tuple[list[float], list[np.ndarray]]:
    """Of one window's states after one block, (…, channels) float32: what adds up over windows
    (squared error and norm, mean error by position, mean kurtosis of both), and the largest
    absolute value of every channel of both."""
    error, norm = (mx.square(x).sum(axis=-1) for x in (state - reference, reference))
    both = state, reference
    numbers = [error.sum(), norm.sum(), mx.sqrt(error / norm).mean(),
               *(_kurtosis(h).mean() for h in both)]
    return ([x.item() for x in numbers],
            [np.array(mx.abs(h).max(axis=tuple(range(h.ndim - 1)))) for h in both])


def _kurtosis(h: mx.array) -> mx.array:
    """E[(x − μ)⁴] / σ⁴ over the last axis: shape (…, channels) gives (…)."""
    centred = h - h.mean(axis=-1, keepdims=True)
    # Scaled before the fourth power, which would overflow float32 where one channel is huge.
    scale = mx.rsqrt(mx.maximum(mx.square(centred).mean(axis=-1, keepdims=True), 1e-30))
    return mx.square(mx.square(centred * scale)).mean(axis=-1)


def _largest_channels(peak: np.ndarray) -> list[Channel]:
    order = np.argsort(-peak, kind="stable")[:_CHANNELS]
    return [Channel(int(index), float(peak[index])) for index in order]


def plot(layers: list[LayerError], path: Path) -> None:
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
