"""How many tokens of a prompt are computed together.

Where no fused kernel computes attention, a score is laid out for each head, token of the step and
position before it: mlx-lm has no such kernel for quantised keys and values, MLX none for a plain
CPU. A long context is then read in smaller steps, so that scores take half a gigabyte at most, or
what 64 tokens take.
"""

PROMPT_STEP, _LEAST = 2048, 64  # tokens
MOST_SCORES = 1 << 29  # bytes


def scores_bytes(heads: int, tokens: int, context: int, number: int) -> int:
    """Bytes of all scores of ``tokens`` that follow each other at the end of ``context``, each a
    ``number`` of 2 or 4 bytes."""
    return number * heads * tokens * context


def prompt_step(heads: int, context: int, number: int) -> int:
    """Tokens to compute together up to ``context`` where their scores are laid out."""
    step = PROMPT_STEP
    while step > _LEAST and scores_bytes(heads, step, context, number) > MOST_SCORES:
        step //= 2
    return step
