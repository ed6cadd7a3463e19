"""What a server does where a request does not say."""

from dataclasses import dataclass, field

from mlxquant.base import checks
from mlxquant.base.errors import BadValue
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.sampling import Sampling


@dataclass(frozen=True)
class Options:
    """``origins`` are those of web pages that may call it, ``*`` any; ``prompt_caches`` is how
    many conversations keep their keys and values. Raises ``BadValue`` outside the ranges."""

    host: str = "127.0.0.1"
    port: int = 8080
    max_tokens: int = 1024
    sampling: Sampling = field(default_factory=Sampling)
    kv_bits: int | None = None
    draft: LanguageModel | None = None
    origins: tuple[str, ...] = ()
    prompt_caches: int = 10
    verbose: bool = False

    def __post_init__(self) -> None:
        checks.integer("port", self.port, 0, 65535)
        checks.integer("max_tokens", self.max_tokens, 1)
        checks.integer("prompt_caches", self.prompt_caches, 0)
        if self.draft is not None and self.kv_bits is not None:
            raise BadValue("kv_bits and a draft model exclude each other; give one")
