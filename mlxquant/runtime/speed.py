"""How fast a run was, beside what the hardware allows."""

from dataclasses import dataclass

from mlxquant.machine import chips
from mlxquant.runtime import probe


@dataclass(frozen=True)
class Report:
    """Counts, timings and traffic of one reply; None where a value is not known.

    ``prompt_tokens`` were processed now, ``cached_tokens`` were already in the
    prompt cache. Decode speed counts the tokens after the first, which belongs
    to the prompt's time (``ttft_s``, seconds). ``guessed_tokens`` of the reply were
    guessed ahead and found right, None without guessing; with it, bytes per token are
    those of all passes divided by the tokens.
    """

    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    guessed_tokens: int | None
    prompt_tps: float
    generation_tps: float | None
    ttft_s: float
    bytes_per_token: int
    gb_per_s: float | None
    ceiling_gb_per_s: float
    ceiling_source: str
    headline_gb_per_s: float | None
    percent_of_ceiling: float | None
    peak_memory_gb: float

    def line(self) -> str:
        """One line for people."""
        cached = f" (+{self.cached_tokens} cached)" if self.cached_tokens else ""
        guessed = "" if self.guessed_tokens is None else f", {self.guessed_tokens} guessed right"
        line = (f"prompt {self.prompt_tokens} tokens{cached} at {self.prompt_tps:.1f} tokens/s · "
                f"reply {self.generation_tokens} tokens{guessed}")
        if self.generation_tps is not None and self.gb_per_s is not None:
            line += (f"{guessed and ','} at {self.generation_tps:.1f} tokens/s · "
                     f"{self.bytes_per_token / 1e9:.3f} GB/token, {self.gb_per_s:.1f} GB/s = "
                     f"{self.percent_of_ceiling:.0f} % of {self.ceiling_gb_per_s:.1f} GB/s "
                     "measured here")
            if stated := self.headline_gb_per_s:
                line += f", {100 * self.gb_per_s / stated:.0f} % of {stated:g} GB/s stated"
        return f"{line} · peak {self.peak_memory_gb:.2f} GB"


def make(*, prompt_tokens: int, cached_tokens: int, generation_tokens: int, ttft_s: float,
         decode_s: float, bytes_per_token: int, peak_bytes: int, passes: int | None = None,
         guessed_tokens: int | None = None) -> Report:
    """Turn raw counts and seconds into a report, with this machine's ceilings.

    ``passes`` over the weights made the reply, each reading ``bytes_per_token``; unless
    given, there was one for each token.
    """
    steps = generation_tokens - 1
    further = steps if passes is None else passes - 1  # the first pass belongs to the prompt
    tps = steps / decode_s if further > 0 and decode_s > 0 else None
    if tps is not None:
        bytes_per_token = round(bytes_per_token * further / steps)
    rate = None if tps is None else tps * bytes_per_token / 1e9
    percent, ceiling = probe.percent_of_ceiling(rate or 0.0)
    return Report(
        prompt_tokens=prompt_tokens, cached_tokens=cached_tokens,
        generation_tokens=generation_tokens, guessed_tokens=guessed_tokens,
        prompt_tps=prompt_tokens / ttft_s, generation_tps=tps, ttft_s=ttft_s,
        bytes_per_token=bytes_per_token, gb_per_s=rate,
        ceiling_gb_per_s=ceiling.gb_per_s, ceiling_source="probe",
        headline_gb_per_s=chips.detect().headline_gb_per_s,
        percent_of_ceiling=None if rate is None else percent,
        peak_memory_gb=peak_bytes / 1e9)
