"""The model card of a quantised folder: README.md, written from what config.json and the files say."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxquant.model.inspection import Inspection, inspect_folder
from mlxquant.quantise.calibration import none
from mlxquant.sources import checkpoint, recipes

_CARD = "README.md"


@dataclass(frozen=True)
class Base:
    """The model that was quantised; None where its licence or page is not known."""

    name: str
    title: str
    licence: str | None = None
    homepage: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def base_of(name: str, folder: Path) -> Base:
    """What is known of the model called ``name``, which ``folder`` holds: a recipe's own words, or
    else the licence that its card names."""
    if name in recipes.names() and not Path(name).exists():
        return Base(name, **recipes.about(name))
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return Base(name if on_hub else folder.name, name if on_hub else folder.name, _licence(folder / _CARD),
                f"https://huggingface.co/{name}" if on_hub else None)


def write(folder: Path, name: str) -> None:
    """Put a card into a folder that ``quantize`` or ``tune`` makes under ``name``; one that says nothing
    of how it was made, or of what, gets none."""
    config = checkpoint.read_config(folder)
    record = config.get("mlxquant_record", {})
    if record.get("base"):
        text = _text(name, Base(**record["base"]), record, inspect_folder(folder), config["model_type"])
        (folder / _CARD).write_text(text, encoding="utf-8")


def _text(name: str, base: Base, record: dict[str, Any], found: Inspection, model_type: str) -> str:
    ours = model_type == "mlxquant"
    front = [f"base_model: {base.name}", *([f"license: {base.licence.lower()}"] if base.licence else []),
             f"library_name: {'mlxquant' if ours else 'mlx'}", "tags:", "- mlx", "- quantized", "- mlxquant"]
    title = f"[{base.title}]({base.homepage})" if base.homepage else base.title
    licence = f"Its licence, {base.licence}, holds for this model too." if base.licence else \
        "Its licence is not known here; it holds for this model too."
    runs = "mlxquant alone runs it: its layers are not MLX's own." if ours else \
        "It is a plain MLX checkpoint: mlx-lm runs it as well."
    rows = "\n".join(f"| {what} | {value} |" for what, value in _rows(record, found))
    return "\n".join(["---", *front, "---", f"""
# {name}

{title}, quantised by mlxquant {record['version']}. {licence}

| | |
|---|---|
{rows}

{runs}

```
mlxquant chat {name}
mlxquant evaluate {name} --text FILE --reference {base.name}
```

The second line measures perplexity and the distance from the original on a text of your own: what is lost
depends on it, and fewer bits lose more.
"""])


def _rows(record: dict[str, Any], found: Inspection) -> list[tuple[str, str]]:
    calibration, error = record["calibration"], record.get("output_error")
    source = calibration["source"]
    rows = [("method", _method(record)),
            ("calibration", source if source == none().source else
             f"{calibration['samples']} samples of {calibration['sequence_length']} tokens, {source}"),
            ("size", f"{found.bits_per_weight:.2f} bits per weight of the body, {found.file_bytes / 1e6:.1f} MB; "
                     f"{found.bytes_per_token / 1e6:.1f} MB read per token")]
    if error:
        rows.append(("error of the layers' outputs, calibration text",
                     f"{100 * error['mean']:.2f} % of their energy on average, {100 * error['largest']:.2f} % "
                     f"at most ({error['layer']})"))
    if tuned := record.get("tuned"):
        rows.append(("tuned", f"{tuned['schedule']['steps']} steps on {tuned['data']}: divergence from the original on "
                              f"held-out text {tuned['divergence_before']:.4f} → {tuned['divergence_after']:.4f} nats"))
    return rows


def _method(record: dict[str, Any]) -> str:
    parts = [f"{record['method']}, {record['bits']} {'' if record['bits'] == 'ternary' else 'bits'}".strip()]
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
        parts.append("other widths for some layers")
    return ", ".join(parts)


def _licence(card: Path) -> str | None:
    """The licence that a card's head names."""
    if not card.is_file():
        return None
    found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    named = re.search(r"^license:\s*(\S+)\s*$", found[1], re.MULTILINE) if found else None
    return named[1] if named else None
