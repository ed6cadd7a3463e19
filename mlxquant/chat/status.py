"""One line about the model and the last reply, as wide as the window allows."""

from mlxquant.base.errors import MlxquantError
from mlxquant.chat.conversation import Conversation
from mlxquant.model.inspection import inspect_folder
from mlxquant.model.loading import LanguageModel


def segments(conversation: Conversation, bits: float | None) -> list[str]:
    """What the line says, most important first; what is not known is left out."""
    report = conversation.last_report
    parts = [conversation.model.name.rstrip("/").rpartition("/")[2]]
    if bits is not None:
        parts.append(f"{bits:.2f} bits")
    parts.append(f"context {conversation.used()}")
    if report is not None and report.generation_tps is not None:
        parts.append(f"{report.generation_tps:.1f} tokens/s")
    if report is not None and report.percent_of_ceiling is not None:
        parts.append(f"{report.percent_of_ceiling:.0f} % of ceiling")
    return parts


def fit(parts: list[str], width: int) -> str:
    """Those of ``parts`` that fit into one line; the first one is cut rather than left out."""
    line = parts[0][:width]
    for part in parts[1:]:
        if len(line) + len(part) + 3 <= width:
            line += f" · {part}"
    return line


def bits_per_weight(model: LanguageModel) -> float | None:
    """Stored bits per weight of the body; None where the folder cannot be read again."""
    try:
        return inspect_folder(model.folder).bits_per_weight
    except MlxquantError:
        return None
