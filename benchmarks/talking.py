"""How near models stay to their original where it talks: KL on conversations, and six answers.

    python benchmarks/talking.py FOLDER [FOLDER …] --teacher MODEL [--windows 64] [--length 512]
        [--tokens 120] [--out NAME]

The original writes the conversations with itself, from another seed than ``mlxquant tune
--conversations`` has, so no folder was trained on them. Rows are written as they come.
"""

from pathlib import Path
from typing import Any

import numpy as np
from real_models import answers
from record import parser, save

# isort: split
import mlx.core as mx

from mlxquant.model.loading import LanguageModel, load
from mlxquant.quantise.conversations import converse
from mlxquant.report.divergence import position_kl

SEED = 1 << 20


def distance(model: LanguageModel, teacher: LanguageModel, rows: np.ndarray) -> dict[str, float]:
    """Mean KL(teacher ‖ model) in nats per token, its standard error over conversations, and the
    share of tokens with the same likeliest successor."""
    means, same = [], []
    for row in rows:
        p, q = (each.network(mx.array(row[None])).astype(mx.float32) for each in (teacher, model))
        means.append(position_kl(p, q).mean().item())
        same.append((p.argmax(-1) == q.argmax(-1)).mean().item())
    return {"kl_mean": float(np.mean(means)),
            "kl_stderr": float(np.std(means, ddof=1) / np.sqrt(len(means))),
            "top1_agreement": float(np.mean(same))}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("folders", nargs="+")
    options.add_argument("--teacher", required=True)
    options.add_argument("--windows", type=int, default=64)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--tokens", type=int, default=120, help="Of an answer, at most.")
    options.add_argument("--out", default="talking")
    a = options.parse_args()
    teacher = load(a.teacher, dense=True)
    rows = converse(teacher, a.windows, a.length, SEED)
    kept: list[dict[str, Any]] = []
    for folder in a.folders:
        model = load(folder, dense=True)
        kept.append({"folder": Path(folder).name, **distance(model, teacher, rows),
                     "answers": answers(model, a.tokens)})
        print(f"{kept[-1]['folder']}: KL {kept[-1]['kl_mean']:.4f} ± {kept[-1]['kl_stderr']:.4f}, "
              f"same likeliest token {100 * kept[-1]['top1_agreement']:.1f} %", flush=True)
        for given in kept[-1]["answers"]:
            print(f"  {given['prompt']}\n    {given['answer']!r}", flush=True)
        save(a.out, teacher=Path(a.teacher).name, windows=a.windows, length=a.length, rows=kept)


if __name__ == "__main__":
    main()
