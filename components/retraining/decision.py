"""What a step of retraining has decided: in ``decision.json`` of its folder, for the steps after it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from components.common.errors import RetortError
from components.common.storage import need, read_json, write_json

FILE = "decision.json"
SCHEMA_VERSION = 1
Way = Literal["", "update", "expand", "original"]


class Decision(BaseModel):
    """Whether retraining goes on, and why.

    Attributes:
        reason: a sentence, without the stop at its end.
        way: how the champion is trained: it learns on (``update``), its head grows (``expand``), or all
            begins anew (``original``); empty before that is decided, and where nothing is trained.
        champion: the version that is champion.
        otherwise: whether code or parameters are known to differ from those of the last retraining.
        data, code, params, rows: what was looked at; see ``memory.Seen``.
        clean: the clean rows that were looked at; before that, those of the last retraining.
    """

    model_config = ConfigDict(extra="ignore")

    schema_version: int = SCHEMA_VERSION
    go_on: bool
    reason: str
    way: Way = ""
    champion: int | None = None
    otherwise: bool = False
    data: str = ""
    code: str = ""
    params: str = ""
    rows: int = 0
    clean: str = ""

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))


def read_decision(folder: Path, made_by: str) -> Decision:
    """The decision that a step left in its folder.

    Raises:
        RetortError: when it is missing, or none.
    """
    path = need(folder / FILE, made_by)
    try:
        return Decision.model_validate(read_json(path))
    except ValidationError as error:
        raise RetortError(
            f"{path}: no decision ({error.errors()[0]['msg']}); run '{made_by}' again"
        ) from None
