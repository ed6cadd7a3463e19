"""Which of a plan's forms to make, or in one line what would fit where none does."""

from mlxquant.base.errors import BadValue, TooLarge
from mlxquant.report.host import memory_for
from mlxquant.report.plan import Plan, Row, recommend

_TOKENS = 256  # a context that is proposed is a multiple of it


def choose(plan: Plan, rows: list[Row], chip: str | None = None) -> Row:
    """What ``recommend`` takes of those ``rows`` of a plan that can be made. Raises ``BadValue``
    where nothing is known of the quality of any, ``TooLarge`` where none fits."""
    if (row := recommend(rows)) is not None:
        return row
    known = [row for row in rows if row.quality is not None and row.free_replicas is not False]
    if not known:
        raise BadValue(f"none of the forms of {plan.model} that were asked for has a measured "
                       "quality; `mlxquant plan` shows those that have")
    least = min(known, key=lambda row: row.total_bytes)
    tokens = int((plan.memory_bytes - least.total_bytes + least.kv_bytes) * plan.context
                 / max(least.kv_bytes, 1)) // _TOKENS * _TOKENS
    size = memory_for(least.total_bytes, chip)
    fitting = [f"--fit {size}GB"] * (size is not None) + [f"--fit-context {tokens}"] * (tokens > 0)
    raise TooLarge(
        f"nothing of {plan.model} fits in {plan.memory_bytes / 1e9:.2f} GB with {plan.context:,} "
        f"tokens: {least.label()} with {least.kv_bits}-bit keys and values takes "
        f"{least.total_bytes / 1e9:.2f} GB; {' or '.join(fitting) or 'no machine'} would do")
