"""The Hugging Face hub, through ``huggingface_hub`` and its cache; its ``HF_*`` variables apply.

It is imported where it is used: a command that needs no hub starts sooner.
"""

from pathlib import Path

from mlxquant.base.errors import ModelNotFound, first_line

# Weights, configuration and tokenizers; never code, never pickles.
FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]

_PATIENCE = 3.0  # seconds for the hub's first answer, where another source follows


def snapshot(repository: str, revision: str | None, files: list[str] = FILES) -> Path:
    """The local folder of a repository; raises ``ModelNotFound``."""
    from huggingface_hub import errors, snapshot_download

    unreachable = f"{repository} is not in the cache and the Hugging Face hub cannot be reached"
    reasons = {
        errors.GatedRepoError: f"{repository} needs a licence accepted on its page, "
                               "then `hf auth login`",
        errors.RevisionNotFoundError: f"{repository} has no revision {revision!r}",
        errors.RepositoryNotFoundError: f"no Hugging Face repository {repository} (or it is "
                                        "private: `hf auth login`)",
        errors.LocalEntryNotFoundError: unreachable, errors.OfflineModeIsEnabled: unreachable}
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except errors.HFValidationError as error:
        raise ModelNotFound(f"{repository!r} is not a repository name: {error}") from error
    except Exception as error:  # its HTTP client raises classes of its own
        known = (reason for kind, reason in reasons.items() if isinstance(error, kind))
        raise ModelNotFound(next(known, f"cannot fetch {repository}: {first_line(error)}")
                            ) from error


def file(repository: str, name: str, revision: str | None) -> Path:
    """One file of a repository, in the hub's cache; ``ModelNotFound`` soon where no hub answers."""
    import huggingface_hub as hub

    try:
        kept = hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(kept, str):
            return Path(kept)
        # The download itself would try five times, for a minute.
        address = hub.hf_hub_url(repository, name, revision=revision)
        hub.get_hf_file_metadata(address, timeout=_PATIENCE)
        return Path(hub.hf_hub_download(repository, name, revision=revision))
    except Exception as error:  # refused, missing, no network: whatever it is, there is no file
        raise ModelNotFound(f"cannot fetch {name} from {repository}: "
                            f"{first_line(error)}") from error


def cached_repositories() -> list[str]:
    """The names of the repositories in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [f.name.removeprefix("models--").replace("--", "/")
            for f in Path(HF_HUB_CACHE).glob("models--*--*")]
