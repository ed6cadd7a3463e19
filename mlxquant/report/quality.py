"""What a width costs in quality, as measured: on the model at hand, on another, or published."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlxquant.base.storage import shipped
from mlxquant.sources import recipes


@dataclass(frozen=True)
class Quality:
    """``ratio`` is the perplexity over the original's; ``flags`` are ``quantize``'s for the method
    that reached it; ``rank`` is 0 for a measurement of this model, 1 of another one, 2 for a
    published one."""

    ratio: float
    source: str
    flags: str
    rank: int


def lookup(model: str, bits: int | str, replicas: int | None, group: int | None) -> Quality | None:
    """The most trustworthy measurement of a width with its replicas and group, or None."""
    found, name = [], _plain(_source_of(model))
    for row in _rows():
        if (row["bits"], row["replicas"], row["group"]) == (bits, replicas, group):
            same = _plain(row["model"]) in name
            rank = 2 if row["source"].startswith("published") else 0 if same else 1
            source = row["source"] + (", not on this model" if rank == 1 else "")
            found.append(Quality(row["ratio"], source, row["flags"], rank))
    return min(found, key=lambda quality: quality.rank, default=None)


def _source_of(model: str) -> str:
    """The name that a model's publisher gives it: of a recipe's file, or of the folder or file that
    a path leads to."""
    return recipes.read(model).file if model in recipes.names() else Path(model).resolve().name


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


@cache
def _rows() -> list[dict[str, Any]]:
    path = shipped("report/quality.json", "benchmarks/quality.json")
    return json.loads(path.read_text(encoding="utf-8"))["rows"]
