"""Finished blocks on disk, so that a killed job goes on at the block it was in."""

import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from mlxquant.base.storage import save_arrays, working_folder
from mlxquant.base.version import __version__
from mlxquant.quantise.calibration import Calibration
from mlxquant.quantise.job import Job, record
from mlxquant.quantise.storing import BlockResult
from mlxquant.quantise.walk import identity

_ENTRIES = ("plain", "layers", "replicas", "errors")


def write_result(file: Path, prefix: str, result: BlockResult) -> None:
    save_arrays(file, {f"{prefix}.{p}": a for p, a in result.tensors.items()},
                {name: json.dumps(getattr(result, name)) for name in _ENTRIES})


def read_result(file: Path, prefix: str) -> BlockResult:
    tensors, metadata = mx.load(str(file), return_metadata=True)
    return BlockResult({p.removeprefix(f"{prefix}."): a for p, a in tensors.items()},
                       *(json.loads(metadata[name]) for name in _ENTRIES))


def open_partial(output: Path, folder: Path, job: Job, tokens: Calibration) -> Path:
    """The working folder of this very job; raises where it belongs to another."""
    job_identity = identity(folder, asdict(job), tokens.digest, __version__)
    return working_folder(output, job_identity, record(job, tokens))
