"""Finished blocks on disk, so that a killed job goes on at the block it was in."""

import json
from pathlib import Path

import mlx.core as mx

from mlxquant.base.storage import save_arrays
from mlxquant.quantise.storing import BlockResult

_ENTRIES = ("plain", "layers", "replicas", "errors", "tuned")


def write_result(file: Path, path: str, result: BlockResult) -> None:
    """Write the result of the block at ``path`` in one step."""
    prefix = f"{path}." if path else ""
    save_arrays(file, {f"{prefix}{p}": a for p, a in result.tensors.items()},
                {name: json.dumps(getattr(result, name)) for name in _ENTRIES})


def read_result(file: Path, path: str) -> BlockResult:
    """Read what ``write_result`` wrote."""
    tensors, metadata = mx.load(str(file), return_metadata=True)
    prefix = f"{path}." if path else ""
    return BlockResult({p.removeprefix(prefix): a for p, a in tensors.items()},
                       *(json.loads(metadata[name]) for name in _ENTRIES))
