"""Run the command line, and let something go wrong at one of the moments when it touches the disk.

    python faulty.py ACTION MOMENT TARGET VERB …

``kill`` ends the process as kill -9 does, ``pause`` writes TARGET and waits, ``touch`` and ``shrink`` change the file
TARGET, ``fill`` makes it so long that its disk is full. MOMENT counts reads of GGUF tensors, writes,
syncs and renames; those after it go on undisturbed.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from mlxquant import cli
from mlxquant.base import tensor_file

action, moment, target = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
passed = 0


def disturb() -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "pause":
        target.write_text("here")
        time.sleep(60)
    elif action == "touch":
        os.utime(target, ns=(1, 1))
    elif action == "fill":
        with contextlib.suppress(OSError), target.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    elif action == "shrink":
        os.truncate(target, target.stat().st_size // 2)


def watch(owner, name: str) -> None:
    original = getattr(owner, name)

    def watched(*args, **kwargs):
        global passed
        passed += 1
        if passed == moment:
            disturb()
        return original(*args, **kwargs)

    setattr(owner, name, watched)


for owner, name in ((np, "fromfile"), (tensor_file, "write"), (os, "fsync"), (os, "replace"), (Path, "rename")):
    watch(owner, name)
sys.argv[:] = ["mlxquant", *sys.argv[4:]]
cli.main()
