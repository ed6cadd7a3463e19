"""From a model's name to a local folder that mlx-lm can load: the name of a folder, a GGUF file, a
recipe (``models/*.toml``) or a Hugging Face repository (``owner/name``), in this order."""

import difflib
import re
from os import PathLike
from pathlib import Path
from typing import Any

from mlxquant.base import checks
from mlxquant.base.errors import BadValue, ModelNotFound
from mlxquant.sources import checkpoint, gguf, hub, recipes

DEFAULT_MODEL = "smollm2-135m"

_REPOSITORY = re.compile(r"(?!\.)[\w.-]+/[\w.-]+(?<!\.gguf)(?<!\.json)")


def resolve(name: str | PathLike[str], *, revision: str | None = None,
            progress: gguf.Progress = lambda *_: None) -> Path:
    """The local, validated folder of the model called ``name``.

    Downloads and GGUF imports are kept in the cache; ``progress`` is that of an import. Raises
    ``ModelNotFound`` (with near matches), ``BadCheckpoint`` or ``Unsupported``, and ``BadValue``
    for the ``revision`` of anything but a repository.
    """
    name = checks.path("model", name)
    _check_revision(revision, name)
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path
    elif path.is_file():
        folder = gguf.import_cached(path, progress)
    elif name in recipes.names():
        folder = gguf.import_cached(recipes.fetch(recipes.read(name)), progress)
    elif _REPOSITORY.fullmatch(name):
        folder = _download(name, revision)
    elif path.suffix.lower() in (".gguf", ".json") or name.startswith((".", "/", "~")):
        raise ModelNotFound(f"no such file or folder: {name}")
    else:
        raise ModelNotFound(f"no model named {name!r}: give a folder, a GGUF file, a repository "
                            f"(owner/name) or one of: {', '.join(recipes.names())}{_near(name)}")
    checkpoint.validate(folder)
    return folder


def config_of(name: str, *, revision: str | None = None) -> dict[str, Any]:
    """The configuration of the model called ``name``, without fetching weights for it.

    Of a repository only ``config.json`` is downloaded; a ``.json`` file is a configuration
    itself. Raises what ``resolve`` raises.
    """
    _check_revision(revision, name)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        return checkpoint.read_object(path, "model_type")
    if path.is_dir():
        return checkpoint.read_config(path)
    if path.is_file() or name in recipes.names() or not _REPOSITORY.fullmatch(name):
        return checkpoint.read_config(resolve(name))
    return checkpoint.read_config(_download(name, revision, ["config.json"]))


def _download(repository: str, revision: str | None, files: list[str] = hub.FILES) -> Path:
    try:
        return hub.snapshot(repository, revision, files)
    except ModelNotFound as error:
        raise ModelNotFound(f"{error}{_near(repository)}") from error


def _near(name: str) -> str:
    known = {n.lower(): n for n in [*recipes.names(), *hub.cached_repositories(),
                                    *(p.name for p in Path().iterdir() if p.is_dir())] if n != name}
    near = [known[n] for n in difflib.get_close_matches(name.lower(), known, n=3)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _check_revision(revision: str | None, name: str) -> None:
    """Only a repository has revisions: raise ``BadValue`` where ``name`` is something else."""
    if revision is not None and (Path(name).expanduser().exists() or name in recipes.names()):
        raise BadValue(f"revision is {revision!r}, but {name} is no Hugging Face repository")
