"""The results of quantising blocks: their tensors, and their entries of config.json.

Finished blocks wait on disk, so that a killed job goes on at the block it was in.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxquant.base.storage import save_arrays
from mlxquant.layers.blocks import Block
from mlxquant.layers.formats import Entries
from mlxquant.quantise.plans import BlockPlan
from mlxquant.quantise.settings import Settings


@dataclass
class Body:
    """``plain``, ``layers`` and ``replicas`` are entries of config.json by path: plain layers'
    widths, single layers that stock mlx-lm lacks, and replicated siblings. ``errors`` are
    E‖(Ŵ − W) x‖² / E‖W x‖² of every layer on the calibration text, before its block is tuned;
    ``tuned`` are the errors of blocks before and after tuning, or why one was left."""

    plain: Entries = field(default_factory=dict)
    layers: Entries = field(default_factory=dict)
    replicas: Entries = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)

    def add(self, block: Block, result: "BlockResult") -> None:
        """Take in one block's."""
        if result.tuned:
            self.tuned[block.path] = result.tuned
        for kind in ("plain", "layers", "replicas", "errors"):
            getattr(self, kind).update({block.full(path): entry
                                        for path, entry in getattr(result, kind).items()})

    def output_error(self) -> dict[str, Any]:
        """The errors' mean, the largest, and in which layer."""
        if not self.errors:
            return {"mean": 0.0, "largest": 0.0, "layer": None}
        worst = max(self.errors, key=lambda path: self.errors[path])
        return {"mean": sum(self.errors.values()) / len(self.errors),
                "largest": self.errors[worst], "layer": worst}


@dataclass
class BlockResult(Body):
    """The same entries of one block, by path in it, with its ``tensors``. ``remainders`` (m, n)
    int8 are the distances of the float weights from the codes, in 256ths of a level; they are not
    kept on disk."""

    tensors: dict[str, mx.array] = field(default_factory=dict)
    remainders: dict[str, mx.array] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, block: Block) -> "BlockResult":
        """What ``write`` wrote."""
        tensors, entries = mx.load(str(file), return_metadata=True)
        return cls(**{kind: json.loads(entry) for kind, entry in entries.items()},
                   tensors={p.removeprefix(block.full("")): a for p, a in tensors.items()})

    def write(self, file: Path, block: Block) -> None:
        """Put the result of ``block`` into ``file`` in one step."""
        save_arrays(file, {block.full(path): array for path, array in self.tensors.items()},
                    {kind.name: json.dumps(getattr(self, kind.name)) for kind in fields(Body)})


@dataclass
class Work:
    """A block that is being quantised: dense float32, changed by folding; the plan of its layers,
    and the result so far."""

    block: Block
    plan: BlockPlan
    settings: Settings
    result: BlockResult
