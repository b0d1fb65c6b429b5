"""``retort clean``: remove what can be remade, and say how much room that gave."""

from __future__ import annotations

from pathlib import Path

from components.common.storage import human_bytes, remove, state_dir
from pipelines.catalogue import PIPELINES
from pipelines.params import Params
from pipelines.steps import OUTPUTS

KEPT = ("mlflow", "spool", "run.json", "lock", "lock.holder")  # history, and what the tracker has yet to get


def clean(params: Params, dry_run: bool) -> None:
    """Remove outputs, manifests, the embedded data, caches and checkpoints, DVC's cache included.

    Own images, ``params.yaml``, ``dvc.lock``, MLflow's history and the spool are never touched.
    """
    total = 0
    for path in _remakable(params):
        size = _size(path)
        total += size
        print(f"{'would remove' if dry_run else 'removed'} {path} ({human_bytes(size)})")
        if not dry_run:
            remove(path)
    print(f"{human_bytes(total)} {'would be' if dry_run else ''} free".replace("  ", " "))


def _remakable(params: Params) -> list[Path]:
    from components.dataset import digits

    # by name: a person's own manifests may lie beside them
    made = dict.fromkeys(
        Path(place)
        for pipeline in PIPELINES
        for stage in pipeline.stages
        for place in stage.outputs.values()
        if OUTPUTS not in Path(place).parents
    )
    paths = [OUTPUTS, *made, Path("pipeline.yaml"), Path(".dvc/cache")]
    if params.data.source == "digits" and (Path(params.data.root) / digits.MARK).exists():
        paths.append(Path(params.data.root))
    paths += [entry for entry in state_dir().iterdir() if entry.name not in KEPT]
    return [path for path in paths if path.exists()]


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
