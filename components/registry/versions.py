"""A registered model's versions in MLflow, who is champion, and who was.

Aliases are read one by one, never from a search (which returns them empty). Each promotion is a tag of the
registered model, ``promotion.0001`` and on: only ever added, so that it can be told what was champion when.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.environment import environment
from components.common.errors import RetortError
from components.common.params import Registry
from components.tracking.client import client_settings, connect, first_line, public_uri, reach, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
PROMOTION = "promotion."
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # how the stores say that an alias is free


class Versions:
    """The versions of one registered model. Every method may raise what MLflow raises."""

    def __init__(self, client: MlflowClient, uri: str, name: str) -> None:
        self.client = client
        self.uri = uri
        self.name = name

    def make(self) -> None:
        """Make the registered model, if it is not there."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def holder(self, alias: str) -> ModelVersion | None:
        """The version that holds ``alias`` now."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_model_version_by_alias(self.name, alias)
        except MlflowException as error:
            if error.error_code in ABSENT:
                return None
            raise

    def get(self, version: int) -> ModelVersion:
        """Raises RetortError when there is no such version."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_model_version(self.name, str(version))
        except MlflowException as error:
            if error.error_code in ABSENT:
                raise RetortError(
                    f"version {version}: '{self.name}' has no such version in {public_uri(self.uri)}; "
                    "'retort ui' lists them under Models"
                ) from None
            raise

    def of_content(self, sha256: str) -> ModelVersion | None:
        """The version whose ``model.onnx`` has this hash: the oldest, should there be several."""
        found = self.client.search_model_versions(f"name = '{self.name}'")
        same = [version for version in found if version.tags.get("sha256") == sha256]
        return min(same, key=lambda version: int(version.version), default=None)

    def promotions(self) -> list[dict[str, Any]]:
        """All promotions, the oldest first: ``version``, ``replaced`` (or null), ``at``, ``how``."""
        tags = self.client.get_registered_model(self.name).tags
        return [json.loads(tags[key]) for key in sorted(tags) if key.startswith(PROMOTION)]

    def set_champion(self, version: int, how: str) -> dict[str, Any]:
        """Make ``version`` champion and put it on record."""
        before = self.holder(CHAMPION)
        record = {
            "version": version,
            "replaced": int(before.version) if before else None,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "how": how,
        }
        # first the record: a promotion that is on record and did not happen misleads nobody, since it is
        # looked up by who is champion; one that happened and is not on record could not be taken back
        key = f"{PROMOTION}{len(self.promotions()) + 1:04d}"
        self.client.set_registered_model_tag(self.name, key, json.dumps(record))
        self.client.set_registered_model_alias(self.name, CHAMPION, str(version))
        challenger = self.holder(CHALLENGER)
        if challenger and int(challenger.version) == version:
            self.client.delete_registered_model_alias(self.name, CHALLENGER)
        return record

    def download(self, version: ModelVersion, path: str, folder: Path) -> Path | None:
        """One file of a version's artifacts; None when it has no such file."""
        import mlflow.artifacts
        from mlflow.exceptions import MlflowException

        location = self.client.get_model_version_download_uri(self.name, version.version)
        try:
            got = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{location.rstrip('/')}/{path}", dst_path=str(folder), tracking_uri=self.uri
            )
        except (MlflowException, OSError):
            return None
        return Path(got)


@contextmanager
def opened(registry: Registry, command: str) -> Iterator[Versions]:
    """The versions of ``registry.name``.

    Raises:
        RetortError: when the tracker does not answer: ``command`` cannot do without it.
    """
    uri = tracking_uri(registry)
    with client_settings(60, retries=2):
        try:
            reach(uri)
            client = connect(uri)
        except Exception as error:
            raise _away(uri, command, error) from error
        from mlflow.exceptions import MlflowException

        try:
            with _global_store(uri):
                yield Versions(client, uri, registry.name)
        except MlflowException as error:
            raise _away(uri, command, error) from error


@contextmanager
def _global_store(uri: str) -> Iterator[None]:
    """Make ``uri`` MLflow's global store inside the block, and what it was before afterwards.

    MLflow looks up the model behind a version there, whatever client asks.
    """
    import mlflow

    before = {name: os.environ.get(name) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")}
    with environment(dict.fromkeys(before, uri)):  # MLflow sets both too, and unsets but one
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before["MLFLOW_TRACKING_URI"])  # type: ignore[arg-type]  # None unsets it
            mlflow.set_registry_uri(before["MLFLOW_REGISTRY_URI"] or "")


def _away(uri: str, command: str, error: Exception) -> RetortError:
    return RetortError(
        f"registry.tracking_uri: MLflow at {public_uri(uri)} did not do it ({first_line(error)}).\n"
        f"Start it, or correct the address, and run 'retort {command}' again: nothing else is repeated"
    )
