"""The model card of a quantised folder: README.md, from what config.json and the files say."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxquant.model.inspection import Inspection, gain_line, inspect_folder
from mlxquant.quantise.calibration import none
from mlxquant.sources import checkpoint, recipes

_CARD = "README.md"
_TEXT = """\
---
{front}
---

# {name}

{title}, quantised by mlxquant {version}. {licence}

| | |
|---|---|
{rows}

{runs}

```
mlxquant chat {name}
mlxquant evaluate {name} --text FILE --reference {base}
```

The second line measures perplexity and the distance from the original on a text of your own: what
is lost depends on it, and fewer bits lose more.
"""


@dataclass(frozen=True)
class Base:
    """The model that was quantised; None where its licence or page is not known."""

    name: str
    title: str
    licence: str | None = None
    homepage: str | None = None


def base_of(name: str, folder: Path) -> Base:
    """What is known of the model called ``name``, which ``folder`` holds: what its recipe says, or
    else the licence that its card names."""
    local = Path(name).exists()
    if name in recipes.names() and not local:
        return Base(name, **recipes.about(name))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not local:
        return Base(name, name, _licence(folder / _CARD), f"https://huggingface.co/{name}")
    return Base(folder.name, folder.name, _licence(folder / _CARD))


def write(folder: Path, name: str) -> None:
    """Put a card into a folder that ``quantize`` or ``tune`` makes under ``name``, unless its
    config.json does not say how it was made, or of what."""
    config = checkpoint.read_config(folder)
    record = config.get("mlxquant_record", {})
    if record.get("base"):
        text = _text(name, Base(**record["base"]), record, inspect_folder(folder),
                     ours=config["model_type"] == "mlxquant")
        (folder / _CARD).write_text(text, encoding="utf-8")


def _text(name: str, base: Base, record: dict[str, Any], found: Inspection, ours: bool) -> str:
    front = [f"base_model: {base.name}"]
    licence = "Its licence is not known here; it holds for this model too."
    if base.licence:
        front.append(f"license: {base.licence.lower()}")
        licence = f"Its licence, {base.licence}, holds for this model too."
    front += [f"library_name: {'mlxquant' if ours else 'mlx'}", "tags:",
              "- mlx", "- quantized", "- mlxquant"]
    return _TEXT.format(
        front="\n".join(front), name=name, base=base.name, licence=licence,
        title=f"[{base.title}]({base.homepage})" if base.homepage else base.title,
        version=record["version"],
        rows="\n".join(f"| {what} | {value} |" for what, value in _rows(record, found)),
        runs="mlxquant alone runs it: its layers are not MLX's own." if ours else
        "It is a plain MLX checkpoint: mlx-lm runs it as well.")


def _rows(record: dict[str, Any], found: Inspection) -> list[tuple[str, str]]:
    calibration = record["calibration"]
    source = calibration["source"]
    if source != none().source:
        source = (f"{calibration['samples']} samples of {calibration['sequence_length']} tokens, "
                  f"{source}")
    rows = [("method", _method(record)), ("calibration", source),
            ("size", f"{found.bits_per_weight:.2f} bits per weight of the body, "
                     f"{found.file_bytes / 1e6:.1f} MB; "
                     f"{found.bytes_per_token / 1e6:.1f} MB read per token")]
    if error := record.get("output_error"):
        rows.append(("error of the layers' outputs, calibration text",
                     f"{100 * error['mean']:.2f} % of their energy on average, "
                     f"{100 * error['largest']:.2f} % at most ({error['layer']})"))
    if found.tuned_blocks:
        rows.append(("blocks trained one by one", gain_line(found.tuned_blocks)))
    if tuned := record.get("tuned"):
        rows.append(("tuned", f"{tuned['schedule']['steps']} steps on {tuned['data']}: divergence "
                              "from the original on held-out text "
                              f"{tuned['divergence_before']:.4f} → "
                              f"{tuned['divergence_after']:.4f} nats"))
    return rows


def _method(record: dict[str, Any]) -> str:
    ternary = record["bits"] == "ternary"
    parts = [f"{record['method']}, {record['bits']}{'' if ternary else ' bits'}"]
    if record["method"] == "replica":
        parts.append(f"{record['replicas']} replicas" + f" in groups of {record['replica_group']}"
                     * bool(record["replica_group"]))
    else:
        parts.append(f"groups of {record['group_size']}")
    if record["rotation"]:
        parts.append(f"rotated ({record['rotation']})")
    if record["activation"]:
        parts.append(f"activations rounded to {record['activation']['bits']} bits")
    if record["overrides"]:
        parts.append("some layers otherwise")
    return ", ".join(parts)


def _licence(card: Path) -> str | None:
    """The licence that a card's head names."""
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    named = re.search(r"^license:\s*(\S+)\s*$", found[1], re.MULTILINE) if found else None
    return named[1] if named else None
