"""How far a model strays from the one it was made from: KL divergence on the windows of a text.

At every predicted position of a text's windows (``model/windows.py``) the divergence is
KL(p ‖ q) = Σ p (log p − log q) over the vocabulary, in nats, from float32 log-softmax; p is the
reference's distribution and q the model's. Perplexity can stay level while single answers change;
this cannot (Dutta et al., "Accuracy is not all you need", arXiv 2407.09141).

The noise floor is what the same formula gives between the reference and itself with every hidden
state moved at random by at most one unit in its last place. Running the reference twice, or through
a KV cache, is no such test: many back ends then repeat their rounding to the bit.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.base.errors import BadValue
from mlxquant.layers.hooks import after_each_block
from mlxquant.model.loading import LanguageModel
from mlxquant.model.windows import Window, check_context, first_windows
from mlxquant.report.perplexity import Perplexity, Progress, described, loss

_FLOOR_WINDOWS = 4  # enough for an order of magnitude; each costs one more run of the reference


@dataclass(frozen=True)
class Divergence(Perplexity):
    """Perplexity of a model, and its divergence from a reference, in nats per position.

    ``kl_stderr`` is the standard error over the means of the windows, because positions of one
    window depend on each other; None for a single window. ``kl_noise_floor`` is the mean of |KL| of
    the reference against itself over the first 4 windows: a ``kl_mean`` near it says nothing.
    ``top1_agreement`` is the fraction of positions where both find the same token likeliest.
    """

    kl_mean: float
    kl_p99: float
    kl_stderr: float | None
    kl_noise_floor: float
    top1_agreement: float
    reference_perplexity: float
    perplexity_ratio: float

    def line(self) -> str:
        error = "" if self.kl_stderr is None else f" ± {self.kl_stderr:.2g}"
        return (f"{super().line()}\n"
                f"KL divergence {self.kl_mean:.4g}{error} nats, 99th percentile {self.kl_p99:.4g}, "
                f"noise floor {self.kl_noise_floor:.1g} · same likeliest token "
                f"{100 * self.top1_agreement:.1f} % · perplexity {self.perplexity_ratio:.3f} × "
                f"the reference's {self.reference_perplexity:.2f}")


def divergence(model: LanguageModel, reference: LanguageModel, text: str | Path, *,
               context: int = 1024, windows: int | None = None,
               progress: Progress = lambda *_: None) -> Divergence:
    """Divergence of ``model`` from ``reference`` on a text (a string, or a UTF-8 file's path).

    ``progress`` is called after each window with (done, total, mean KL so far). Both models'
    logits are held for one window at a time. Raises what ``evaluate`` does, and ``BadValue``
    for two models whose vocabularies differ.
    """
    batches = paired_windows(model, reference, text, context, windows)
    found, floor = [], []  # of each window: the positions' divergences; the mean noise
    losses, agreed = [0.0, 0.0], 0  # the model's, the reference's
    for done, window in enumerate(batches, 1):
        p = window.logits(reference.network)
        mx.eval(p)  # before the second run is laid out, so that their activations do not coexist
        if done <= _FLOOR_WINDOWS:
            noisy = _logits_with_noise(reference.network, window)
            floor.append(mx.abs(position_kl(p, noisy)).mean().item())
            del noisy
        q = window.logits(model.network)
        mx.eval(q)
        found.append(np.array(position_kl(p, q))[0])
        agreed += (mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)).sum().item()
        for side, logits in enumerate((q, p)):
            losses[side] += loss(logits, window).item()
        del p, q, logits
        progress(done, len(batches), float(np.mean(found, dtype=np.float64)))
    kl, shape = np.stack(found), described(model, batches)
    means = kl.mean(axis=1, dtype=np.float64)
    own, original = (total / shape["tokens"] for total in losses)
    return Divergence(
        math.exp(own), **shape, kl_mean=float(means.mean()), kl_p99=float(np.percentile(kl, 99)),
        kl_stderr=float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None,
        kl_noise_floor=sum(floor) / len(floor), top1_agreement=agreed / shape["tokens"],
        reference_perplexity=math.exp(original), perplexity_ratio=math.exp(own - original))


def position_kl(p_logits: mx.array, q_logits: mx.array) -> mx.array:
    """KL(p ‖ q) in nats over the last axis of two float32 logits; shape (…, V) gives (…)."""
    return nn.losses.kl_div_loss(nn.log_softmax(q_logits), nn.log_softmax(p_logits))


def paired_windows(model: LanguageModel, reference: LanguageModel, text: str | Path, context: int,
                   windows: int | None = None) -> list[Window]:
    """``first_windows`` of a text that mean the same to both models; raises as ``divergence``."""
    batches = first_windows(model, text, context, windows)
    check_context(reference, context, batches[0].lead)
    sizes = [x.vocabulary for x in (model, reference)]
    if sizes[0] != sizes[1]:
        raise BadValue(f"the vocabulary of {model.name} has {sizes[0]} entries, "
                       f"that of {reference.name} {sizes[1]}; they must be the same")
    if model.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise BadValue(f"the tokenizers of {model.name} and {reference.name} give tokens "
                       "different ids; they must be the same")
    return batches


def _logits_with_noise(network: nn.Module, window: Window) -> mx.array:
    """A window's logits with every hidden state moved by up to its machine epsilon, relatively."""
    key = mx.random.key(0)

    def move(state: mx.array) -> mx.array:
        nonlocal key
        key, own = mx.random.split(key)
        step = mx.finfo(state.dtype).eps * mx.random.uniform(-1, 1, state.shape, key=own)
        return (state.astype(mx.float32) * (1 + step)).astype(state.dtype)

    with after_each_block(network, move):
        return window.logits(network)
