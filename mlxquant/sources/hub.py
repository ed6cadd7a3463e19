"""The Hugging Face hub, through ``huggingface_hub`` and its cache; its ``HF_*`` variables apply."""

from pathlib import Path

from mlxquant.base.errors import ModelNotFound

# Weights, configuration and tokenizers; never code, never pickles.
FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]

_PATIENCE = 3.0  # seconds for the hub's first answer, where another source follows


def snapshot(repository: str, revision: str | None, files: list[str] = FILES) -> Path:
    """The local folder of a repository; raises ``ModelNotFound``."""
    from huggingface_hub import errors as hub  # a command that needs no hub starts sooner
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
    except hub.GatedRepoError as error:
        raise ModelNotFound(f"{repository} needs a licence accepted on its page, "
                            "then `hf auth login`") from error
    except hub.RevisionNotFoundError as error:
        raise ModelNotFound(f"{repository} has no revision {revision!r}") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelNotFound(f"no Hugging Face repository {repository} (or it is private: "
                            "`hf auth login`)") from error
    except hub.HFValidationError as error:
        raise ModelNotFound(f"{repository!r} is not a repository name: {error}") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise ModelNotFound(f"{repository} is not in the cache and the Hugging Face hub "
                            "cannot be reached") from error
    except Exception as error:  # its HTTP client raises classes of its own
        raise ModelNotFound(f"cannot fetch {repository}: {_first_line(error)}") from error


def file(repository: str, name: str, revision: str | None) -> Path:
    """One file of a repository, in the hub's cache; ``ModelNotFound`` soon where no hub answers."""
    from huggingface_hub import (  # a command that needs no hub starts sooner
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )

    try:
        kept = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(kept, str):
            return Path(kept)
        # The download itself would try five times, for a minute.
        get_hf_file_metadata(hf_hub_url(repository, name, revision=revision), timeout=_PATIENCE)
        return Path(hf_hub_download(repository, name, revision=revision))
    except Exception as error:  # refused, missing, no network: whatever it is, there is no file
        raise ModelNotFound(f"cannot fetch {name} from {repository}: "
                            f"{_first_line(error)}") from error


def cached_repositories() -> list[str]:
    """The names of the repositories in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE  # a command that needs no hub starts sooner

    return [f.name.removeprefix("models--").replace("--", "/")
            for f in Path(HF_HUB_CACHE).glob("models--*--*")]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
