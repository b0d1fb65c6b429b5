"""Why weights are no model that predicts, said without building a network."""

from __future__ import annotations

import re
from pathlib import Path

from components.common.errors import RetortError
from components.weights.readers import read

HEAD = r"(_?fc|out|head|classifier|last_linear)\d*[._]"  # what timm, torchvision and Paddle call it
FEATURES = "features.onnx"  # what the step ``weights`` writes beside its weights


def why_no_model(path: Path) -> str | None:
    """Why a file or folder of weights cannot predict, in words that follow its name; None: no weights."""
    if (path / FEATURES).is_file():
        what = "start weights, without a head"
    else:
        try:
            stored = read(path)
        except RetortError:
            return None
        has_head = any(re.match(HEAD, name) for name in stored.tensors)
        what = f"weights ({stored.kind}), " + ("not an exported model" if has_head else "without a head")
    return (
        f"{what}, so they cannot predict: finetune a network that starts from them ('retort finetune'), "
        "export that ('retort export'), and predict with the result"
    )
