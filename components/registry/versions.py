"""A registered model's versions in MLflow, who is champion, and who was.

Aliases are read one by one, never from a search (which returns them empty). A promotion is decided by the
record (``Ledger``), which of all who try at once takes one; the alias follows it, and may be set again by
anybody who finds that whoever wrote the record did not.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.environment import environment
from components.common.errors import RetortError
from components.common.params import Registry
from components.registry.ledger import Ledger, again
from components.tracking.client import client_settings, connect, first_line, public_uri, reach, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # how the stores say that an alias is free
LOCK_SECONDS = 120  # of waiting for other promotions in the same file
UNSETTLED_SECONDS = 3.0  # in which whoever wrote a record sets the alias; then anybody does
MOVED_SECONDS = 1.0  # an alias that differs from the record for so long was moved by a person
MOST_WHO, MOST_WHY = 200, 1000  # letters


class OvertakenError(RetortError):
    """Another version became champion meanwhile; ``champion``: which (None: there is none any more)."""

    def __init__(self, name: str, champion: int | None) -> None:
        now = f"version {champion} is champion" if champion else "there is no champion"
        super().__init__(f"registry.name: of '{name}' {now} by now, since somebody else promoted meanwhile")
        self.champion = champion


class Versions:
    """The versions of one registered model. Every method may raise what MLflow raises."""

    def __init__(self, client: MlflowClient, uri: str, name: str) -> None:
        self.client = client
        self.uri = uri
        self.name = name
        self.ledger = Ledger(client, uri, name)

    def make(self) -> None:
        """Make the registered model, if it is not there."""
        from mlflow.exceptions import MlflowException

        try:
            again(self.client.create_registered_model, self.name)
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

    def there(self, version: int) -> bool:
        """Whether there is such a version (still)."""
        try:
            self.get(version)
        except RetortError:
            return False
        return True

    def need(self) -> None:
        """Raises RetortError when there is no such registered model."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code in ABSENT:
                raise RetortError(
                    f"registry.name: no model '{self.name}' in {public_uri(self.uri)}; "
                    "'retort register' makes it"
                ) from None
            raise

    def of_content(self, sha256: str) -> ModelVersion | None:
        """The version whose ``model.onnx`` has this hash: the oldest, should there be several."""
        found = self.client.search_model_versions(f"name = '{self.name}'")
        same = [version for version in found if version.tags.get("sha256") == sha256]
        return min(same, key=lambda version: int(version.version), default=None)

    def promotions(self) -> list[dict[str, Any]]:
        """All promotions, the oldest first.

        Each has ``number``, ``version``, ``replaced`` (or null), ``at`` (UTC), ``how`` (register, promote,
        rollback; alias: moved in MLflow itself), ``who``, ``why``, ``sha256`` of the version's SHA256SUMS
        (of its model, where it has none), and ``settled``: whether its alias was set. Records of before
        there were ``who``, ``why`` and ``sha256`` have none.
        """
        return self.ledger.records()

    def set_champion(
        self, version: int, how: str, *, expected: int | None, who: str, why: str = ""
    ) -> dict[str, Any]:
        """Make ``version`` champion and put it on record; returns it, ``known`` if it was that already.

        Of several that try at once with the same ``expected``, one does it. A promotion that another process
        left between record and alias is brought to its end first.

        Args:
            expected: the version that was champion when this was decided; None: there was none.

        Raises:
            OvertakenError: when another version is champion by now.
            RetortError: when there is no such version (any more).
        """
        with self._alone():
            self.ledger.open()
            while True:
                records, champion = self._now()
                if champion == version:
                    unrecorded = {"version": version, "replaced": None, "how": "alias"}
                    return {**(records[-1] if records else unrecorded), "known": True}
                if champion != expected:
                    raise OvertakenError(self.name, champion)
                tags = self.get(version).tags
                last = records[-1] if records else None
                record = {
                    "version": version,
                    "replaced": last["version"] if last else champion,
                    "at": datetime.now(UTC).isoformat(timespec="seconds"),
                    "how": how,
                    "who": who[:MOST_WHO],
                    "why": why[:MOST_WHY],
                    "sha256": tags.get("bundle.sha256", tags.get("sha256", "")),
                    "id": uuid.uuid4().hex[:12],
                }
                number = last["number"] + 1 if last else 1
                if self.ledger.append(number, record):
                    break
            self._crown()
            self.get(version)  # it may have been deleted meanwhile
        challenger = self.holder(CHALLENGER)
        if challenger and int(challenger.version) == version:
            again(self.client.delete_registered_model_alias, self.name, CHALLENGER)
        return {"number": number, **record}

    def add(self, source: str, **facts: Any) -> ModelVersion:
        """Make a version; its number is the store's, also where many ask for one at once."""
        return again(self.client.create_model_version, self.name, source, **facts)

    def set_challenger(self, version: int) -> None:
        """Make ``version`` challenger, in place of the one before."""
        again(self.client.set_registered_model_alias, self.name, CHALLENGER, str(version))

    def _now(self) -> tuple[list[dict[str, Any]], int | None]:
        """The record and the champion, once both say the same.

        An alias that somebody moved in MLflow itself is respected, and put on record.
        """
        records = self.promotions()
        if records and not records[-1]["settled"]:
            # in a server's case whoever wrote it may be about to set the alias
            until = time.monotonic() + (0 if self.file else UNSETTLED_SECONDS)
            while not (records := self.promotions())[-1]["settled"] and time.monotonic() < until:
                time.sleep(0.2)
            if not records[-1]["settled"]:
                self._crown()
            return self._now()
        champion = self._champion()
        if not records or champion in (None, records[-1]["version"]):
            return records, champion
        if records != self.promotions():  # another writer was through between the two looks
            return self._now()
        if not self.file:  # a writer may be late; in a file's case nobody but a person can have moved it
            time.sleep(MOVED_SECONDS)
            if champion != self._champion() or records != self.promotions():
                return self._now()
        moved = {
            "version": champion, "replaced": records[-1]["version"],
            "at": datetime.now(UTC).isoformat(timespec="seconds"), "how": "alias", "who": "",
            "why": "seen now: the alias was moved in MLflow itself"
            if self.there(records[-1]["version"])
            else "the version before was deleted",
        }  # fmt: skip
        if self.ledger.append(records[-1]["number"] + 1, moved):
            self.ledger.settle(records[-1]["number"] + 1)
            self.ledger.mirror()
        return self._now()

    def _champion(self) -> int | None:
        holder = self.holder(CHAMPION)
        return int(holder.version) if holder else None

    def _crown(self) -> None:
        """Set the alias to what the record says last, however many promotions follow each other meanwhile.

        A version that was deleted since its record was written gets no alias: it stays where it is.
        """
        from mlflow.exceptions import MlflowException

        while True:
            last = self.promotions()[-1]
            version = str(last["version"])
            try:
                again(self.client.set_registered_model_alias, self.name, CHAMPION, version)
            except MlflowException as error:
                if error.error_code not in ABSENT:
                    raise
            # whoever sets the alias looks again: the last one who does is right
            if self.promotions()[-1]["number"] == last["number"]:
                break
        self.ledger.settle(last["number"])
        self.ledger.mirror()

    @property
    def file(self) -> Path | None:
        """The store's file, where it is one."""
        prefix = "sqlite:///"
        return Path(self.uri.removeprefix(prefix)) if self.uri.startswith(prefix) else None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time, where the store is a file: the system frees the lock of one that dies."""
        if self.file is None:
            yield
            return
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.file.with_name(f"{self.file.name}.promotions.lock"), timeout=LOCK_SECONDS):
                yield
        except Timeout:
            raise RetortError(
                f"{self.file}.promotions.lock: another process has been promoting a version for over "
                f"{LOCK_SECONDS} s; look what it is at, and run this again"
            ) from None

    def download(self, version: ModelVersion, path: str, folder: Path) -> Path | None:
        """One file of a version's artifacts; None when it has no such file.

        Raises:
            RetortError: when the store of its files takes keys that are not set.
        """
        import mlflow.artifacts
        from botocore.exceptions import NoCredentialsError
        from mlflow.exceptions import MlflowException

        location = self.client.get_model_version_download_uri(self.name, version.version)
        try:
            got = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{location.rstrip('/')}/{path}", dst_path=str(folder), tracking_uri=self.uri
            )
        except NoCredentialsError:
            raise RetortError(
                f"version {version.version} of '{self.name}': its files lie in {location}, and no keys were "
                "found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
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
