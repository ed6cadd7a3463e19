"""How the next token is chosen; mlx-lm does the choosing."""

from dataclasses import dataclass
from typing import Any

from mlxquant.base.errors import BadValue


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. ``top_p`` 1, ``top_k`` 0, ``min_p`` 0 and
    ``repetition_penalty`` 1 are off. Raises ``BadValue`` outside the ranges."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in [
                ("temperature", self.temperature, 0, 100), ("top_p", self.top_p, 0, 1),
                ("min_p", self.min_p, 0, 1), ("top_k", self.top_k, 0, 10**9),
                ("repetition_penalty", self.repetition_penalty, 0.01, 100)]:
            if not low <= value <= high:
                raise BadValue(f"{name} is {value}, allowed are {low} to {high}")

    def sampler(self, vocabulary: int) -> Any:
        """An mlx-lm sampler over log-probabilities of ``vocabulary`` entries."""
        from mlx_lm.sample_utils import make_sampler

        return make_sampler(temp=self.temperature, top_p=self.top_p, min_p=self.min_p,
                            top_k=self.top_k if self.top_k < vocabulary else 0)

    def logits_processors(self) -> list[Any]:
        """mlx-lm's processors for what acts on logits rather than probabilities."""
        from mlx_lm.sample_utils import make_logits_processors

        penalty = self.repetition_penalty
        return make_logits_processors(repetition_penalty=penalty) if penalty != 1 else []
