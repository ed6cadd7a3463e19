"""What a job's peak is foretold to be and what it is, in a process of its own."""

import json
import sys
from pathlib import Path

import mlxquant
from mlxquant.layers import outline
from mlxquant.machine.memory import peak_resident
from mlxquant.model.loading import open_lazily
from mlxquant.quantise import room
from mlxquant.quantise.assembly import blocks_of
from mlxquant.quantise.job import Job, Target, Text


def say(folder: str, output: str, text: str, changes: dict) -> None:
    """Print the bytes predicted for a job, MLX's peak, and what the process grew by."""
    room._SPILL_SHARE = changes.pop("spill_share", room._SPILL_SHARE)
    if "target" in changes:
        changes["target"] = Target(**changes["target"])
    job = Job(text=Text((text,))).changed(**{"tune_blocks": False} | changes)
    network, config = open_lazily(Path(folder))
    heads = outline.attention_heads(config)
    predicted, before = room.needs(network, blocks_of(network), job, heads).memory, peak_resident()
    made = mlxquant.quantize(folder, output, job)
    print(json.dumps([predicted, made.peak_memory, peak_resident() - before]))


if __name__ == "__main__":
    say(*sys.argv[1:4], json.loads(sys.argv[4]))
