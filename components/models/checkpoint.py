"""A trained network on disk: ``model.safetensors`` and its card, each proved against the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from components.common.errors import RetortError
from components.common.storage import atomic_path, need, sha256_file
from components.models import build
from components.models.card import ModelCard, read_card

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE, CARD = "model.safetensors", "model.json"
NAMED = 3  # tensors that an error names


def save(model: Path, card_path: Path, module: nn.Module, card: ModelCard) -> ModelCard:
    """Write a network and its card, and prove that a new network reads the same values back.

    Args:
        card: what the network is; its ``sha256`` is filled in.

    Returns:
        The card as written.

    Raises:
        RetortError: when a value is not finite, or the network is not the one that ``card.arch`` describes.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        raise RetortError(f"{model.name}: {_some(bad)} hold values that are not finite; nothing was saved")
    with atomic_path(model) as partial:
        save_file(tensors, str(partial))
        fresh = _filled(build.create(card.arch, len(card.class_names)), partial)
        unequal = [name for name, t in fresh.state_dict().items() if not torch.equal(t, tensors[name])]
        if unequal:
            raise RetortError(f"{model.name}: {_some(unequal)} differ after reading them back")
        card = card.model_copy(update={"sha256": sha256_file(partial)})
    card.write(card_path)
    return card


def load(folder: Path, made_by: str = "finetune") -> tuple[nn.Module, ModelCard]:
    """The network of a folder, in eval mode, on the CPU; and its card.

    Args:
        made_by: the step to run when there is none.

    Raises:
        RetortError: when a file is missing, is not the one that the card names, or does not fill the network
            that the card describes: every tensor, no other one, none of another shape, each value finite.
    """
    card = read_card(need(folder / CARD, made_by))
    path = need(folder / FILE, made_by)
    digest = sha256_file(path)
    if digest != card.sha256:
        raise RetortError(
            f"{path}: sha256 {digest[:12]}..., its card names {card.sha256[:12] or 'none'}...: "
            "the file is damaged, or another one"
        )
    module = _filled(build.create(card.arch, len(card.class_names)), path).eval()
    bad = not_finite(module.state_dict())
    if bad:
        raise RetortError(
            f"{path}: the checkpoint itself holds NaN or infinite values: {bad}; no network can compute with "
            f"them: restore the file, or run 'retort {made_by}' again"
        )
    return module, card


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensors hold NaN or infinite values, and how many; empty when none does."""
    import torch

    counts = {
        name: int((~torch.isfinite(tensor)).sum())
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }
    bad = [name for name, count in counts.items() if count]
    more = f" and {len(bad) - NAMED} more tensors" if len(bad) > NAMED else ""
    return ", ".join(f"{name} ({counts[name]:,} of {tensors[name].numel():,})" for name in bad[:NAMED]) + more


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; a RetortError names the file when it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise RetortError(f"{path}: not a whole .safetensors file ({error})") from None


def _filled(module: nn.Module, path: Path) -> nn.Module:
    tensors = read_tensors(path)
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    extra = [name for name in tensors if name not in own]
    shapes = [
        f"{name} ({list(tensors[name].shape)}, not {list(own[name].shape)})"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    faults = [
        f"{what} {_some(names)}"
        for what, names in (("missing:", missing), ("not in the network:", extra), ("other shape:", shapes))
        if names
    ]
    if faults:
        raise RetortError(
            f"{path}: does not fill the network ({len(own)} tensors, the file has {len(tensors)}): "
            + "; ".join(faults)
        )
    module.load_state_dict(tensors)
    return module


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
