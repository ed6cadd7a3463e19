"""Something goes wrong at one of the moments when a process touches the disk."""

import contextlib
import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlxquant.base import tensor_file


@dataclass
class Fault:
    """Called in a process of its own, before the command line.

    ``kill`` ends the process as kill -9 does, ``pause`` writes ``target`` and waits, ``touch`` and
    ``shrink`` change that file, ``fill`` makes it so long that its disk is full. ``moment`` counts
    reads of GGUF tensors, writes, syncs and renames; those after it go on undisturbed.
    ``limit`` is the longest file in bytes that may be written.
    """

    action: str = "none"
    moment: int = 0
    target: Path | None = None
    limit: int | None = None

    def __call__(self) -> None:
        if self.limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
        for owner, name in ((np, "fromfile"), (tensor_file, "write"), (os, "fsync"),
                            (os, "replace"), (Path, "rename")):
            self._watch(owner, name)

    def _watch(self, owner, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            self.moment -= 1
            if self.moment == 0:
                self._disturb()
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    def _disturb(self) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "pause":
            self.target.write_text("here")
            time.sleep(60)
        elif self.action == "touch":
            os.utime(self.target, ns=(1, 1))
        elif self.action == "fill":
            with contextlib.suppress(OSError), self.target.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        elif self.action == "shrink":
            os.truncate(self.target, self.target.stat().st_size // 2)
