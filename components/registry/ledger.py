"""The record of promotions: a numbered slot for each, which the store lets be written once.

MLflow's client knows no lock and no transaction, but one thing that is written once: a parameter of a run.
Its key is unique in the store's table, and another value is refused, by SQLite and PostgreSQL alike, through
a server or not. Promotion 7 is the parameter ``promotion.0007`` of one run, the registered model's own. Of
all who write it at once the store takes one, and its client can neither change nor remove it afterwards: a
compare-and-set without a lock, so nobody can die with one in hand; and without a clock, so clocks may differ.

The run is named by a tag of the registered model. Who finds none makes one; which of several is taken is
decided by the store too, as names of registered models are unique: one of that name stands for that moment.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from components.common.errors import RetortError
from components.tracking.client import experiment_id

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

log = logging.getLogger(__name__)

T = TypeVar("T")
SLOT = "promotion."
RUN = "promotions.run"  # tag of the registered model: the run whose parameters are the slots
SETTLED = ".alias"  # what follows a slot's key where the alias was seen to be set
IMPORTED = "imported"  # parameter: tags that were the record before there was a run were taken over
MISSING = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
TRIES = 8
PAUSE = 0.1  # seconds before the second try, at most twice as many before each one after it
BUSY = ("TEMPORARILY_UNAVAILABLE", "BAD_REQUEST")  # a locked file; two that insert the same row


def again(work: Callable[..., T], *arguments: Any, **more: Any) -> T:
    """Do ``work``, which may be repeated, until the store has time for it; raises what MLflow raises."""
    from mlflow.exceptions import MlflowException

    for number in range(1, TRIES + 1):
        try:
            return work(*arguments, **more)
        except MlflowException as error:
            busy = error.error_code in BUSY or "Model Version creation error" in str(error)
            if number == TRIES or not busy:
                raise
            time.sleep(random.uniform(0, PAUSE * 2**number))  # noqa: S311 - spreads those who collided
    raise AssertionError


class Ledger:
    """The promotions of one registered model. Every method may raise what MLflow raises."""

    def __init__(self, client: MlflowClient, uri: str, name: str) -> None:
        self.client = client
        self.uri = uri
        self.name = name
        self._run = ""

    def records(self) -> list[dict[str, Any]]:
        """All promotions, the oldest first, each with its ``number`` and whether its alias is ``settled``."""
        tags = {} if self._run else self.client.get_registered_model(self.name).tags
        params = self._params(self._run or tags.get(RUN, ""))
        if params is None or IMPORTED not in params:
            return [{**record, "settled": True} for record in _read(tags)]
        return [
            {**record, "settled": f"{_slot(record['number'])}{SETTLED}" in params} for record in _read(params)
        ]

    def open(self) -> None:
        """Make what slots are written into, if it is not there, with what was on record before."""
        model = self.client.get_registered_model(self.name)
        named = model.tags.get(RUN, "")
        params = self._params(named)
        if params is None:
            named = self._elect(model, gone=named)
            params = self._params(named) or {}
        self._run = named
        if IMPORTED in params:
            return
        for record in _read(self.client.get_registered_model(self.name).tags):
            number = record.pop("number")
            # others that open it now write the same
            self._write(_slot(number), json.dumps(record))
            self._write(f"{_slot(number)}{SETTLED}", "set")
        self._write(IMPORTED, "true")

    def append(self, number: int, record: dict[str, Any]) -> bool:
        """Write the record into slot ``number``; False when another writer was there first."""
        return self._write(_slot(number), json.dumps(record))

    def settle(self, number: int) -> None:
        """Put on record that the alias of promotion ``number`` was set."""
        self._write(f"{_slot(number)}{SETTLED}", "set")

    def mirror(self) -> None:
        """Show the records as tags of the registered model, where MLflow's page of it has them."""
        tags = self.client.get_registered_model(self.name).tags
        for record in self.records():
            key = _slot(record["number"])
            shown = json.dumps({name: record[name] for name in record if name not in ("number", "settled")})
            if tags.get(key) != shown:
                again(self.client.set_registered_model_tag, self.name, key, shown)

    def _write(self, key: str, value: str) -> bool:
        """Write a parameter once; False when it has another value."""
        from mlflow.exceptions import MlflowException

        try:
            again(self.client.log_param, self._run, key, value)
        except MlflowException as error:
            if (
                error.error_code == "INVALID_PARAMETER_VALUE"
                and key in self.client.get_run(self._run).data.params
            ):
                return False
            raise
        return True

    def _params(self, run_id: str) -> dict[str, str] | None:
        """The run's parameters; None when there is no such run. One that was deleted is brought back."""
        from mlflow.exceptions import MlflowException

        if not run_id:
            return None
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code in MISSING:
                return None
            raise
        if run.info.lifecycle_stage != "active":
            self.client.restore_run(run_id)
        return run.data.params

    def _elect(self, model: RegisteredModel, gone: str) -> str:
        """Make a run for the slots, or take the one that another process made for it just now.

        Args:
            gone: the run that the registered model names, and that is no more.
        """
        from mlflow.exceptions import MlflowException

        experiment = experiment_id(self.client, self.uri, f"{self.name} promotions")
        own = self.client.create_run(experiment, run_name=f"promotions of {self.name}").info.run_id
        self.client.set_terminated(own)
        name = f"{self.name}.promotions.{model.creation_timestamp}"
        chosen = self._first(name, own)
        # the tag is set before the name is free again: who gets the name after that finds the tag
        named = self.client.get_registered_model(self.name).tags.get(RUN, "")
        if named and named != gone:
            chosen = named
        else:
            again(self.client.set_registered_model_tag, self.name, RUN, chosen)
        # what is left is in nobody's way. Another may have removed it, and with it the right to remove it
        with suppress(MlflowException):
            if chosen != own:
                self.client.delete_run(own)
        with suppress(MlflowException):
            self.client.delete_registered_model(name)
        return chosen

    def _first(self, name: str, own: str) -> str:
        """The run of whoever made the registered model ``name`` first; ``own`` if that was this process."""
        from mlflow.exceptions import MlflowException

        for _ in range(TRIES):
            try:
                again(self.client.create_registered_model, name, {RUN: own}, "Is removed at once.")
                return own
            except MlflowException as error:
                if error.error_code in MISSING:  # it was there, and is no more
                    continue
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            try:
                chosen = self.client.get_registered_model(name).tags.get(RUN, "")
            except MlflowException as error:
                # whoever made it is through, and removed it; a server with a login may say that otherwise
                if error.error_code not in (*MISSING, "PERMISSION_DENIED"):
                    raise
                continue
            if chosen:  # else it was removed between the store's look at it and at its tags
                return chosen
        raise RetortError(f"{name}: a registered model of this name is in the way; delete it in MLflow")


def _slot(number: int) -> str:
    return f"{SLOT}{number:04d}"


def _read(values: dict[str, str]) -> list[dict[str, Any]]:
    """The records among parameters or tags, in the order of their numbers."""
    found = []
    for key, value in values.items():
        number = key.removeprefix(SLOT)
        if key.startswith(SLOT) and number.isdecimal():
            try:
                found.append({"number": int(number), **json.loads(value)})
            except (ValueError, TypeError):
                log.warning(f"the tag {key} is no record of a promotion, and left out")
    return sorted(found, key=lambda record: record["number"])
