"""The original of a model that is tuned: it predicts, and writes text to train on."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import mlx.core as mx

from mlxquant.layers.by_block import can_let_go, judged
from mlxquant.layers.dense import lazily_dense, to_dense
from mlxquant.layers.head import Judge
from mlxquant.model import loading
from mlxquant.sources.checkpoint import KnownFolder
from mlxquant.sources.names import resolve
from mlxquant.tuning import room


class Teacher:
    """The model called ``name``; its ``network`` keeps weights on disk until they are used. It
    predicts in ``dtype``: ``whole`` in memory where it fits dense or its architecture does not
    allow otherwise, else block by block."""

    def __init__(self, name: str, dtype: mx.Dtype):
        self.name, self.source, self._dtype = name, KnownFolder(resolve(name)), dtype
        self.folder = self.source.folder
        self.network, self._config = loading.open_lazily(self.folder)
        self.whole = room.fits_dense(self.network, dtype) or not can_let_go(self.network)

    @cached_property
    def model(self) -> loading.LanguageModel:
        """The teacher in memory, on a GPU dense where it fits: it reads thousands of tokens at
        once."""
        if mx.default_device() == mx.cpu or not self.whole:
            return loading.load_folder(self.folder, self.name)
        network = to_dense(self.network, self._dtype)
        tokenizer = loading.open_tokenizer(self.folder, self._config)
        return loading.LanguageModel(self.name, self.folder, network, tokenizer, self._config)

    def judged(self, tokens: mx.array, judge: Judge) -> Iterator[Any]:
        """What ``judge`` returns for the logits of ``tokens`` (batch, length), chunk by chunk."""
        if self.whole:
            return judged(self.model.network, tokens, judge)
        vars(self).pop("model", None)  # it was needed only for writing text
        network, _ = loading.open_lazily(self.folder)
        return judged(lazily_dense(network, self._dtype), tokens, judge, once=True)
