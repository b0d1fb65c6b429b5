"""The step ``retrain decide``: are the clean data worth a training, and from where does it start?"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from components.common.findings import Level
from components.common.progress import at, counted
from components.common.storage import need, sha256_json
from components.dataset import drift as shares
from components.dataset import manifest as manifests
from components.dataset.database import database
from components.retraining import look
from components.retraining.champion import Champion, fetch, unfit
from components.retraining.decision import FILE, Decision, read_decision
from components.retraining.memory import Seen, remember
from components.retraining.params import DecideParams
from components.step import StepContext, step

if TYPE_CHECKING:
    import duckdb

log = logging.getLogger(__name__)

MOST_NEW, MOST_OLD = 1_000, 500  # images that the champion is asked about
SURE = 0.001  # chance below which a difference of labels is taken for one
DRIFTED, MOVED = 0.01, 0.02  # the same of looks, and the energy distance from which on it matters
NAMED = 5  # classes that a message names
# by which a row is the same: files may be renamed, and an image that nobody has read is known by its path
SAME = "coalesce(class_name, '') as class, split, source, coalesce(sha256, path) as content"


def decide(params: DecideParams, *, manifest: Path, changes: Path, champion: Path, out: Path) -> None:
    """Compare the clean data with the champion's; writes ``decision.json`` and the folder ``champion``.

    Where nothing is to be done, that is remembered for the next time.

    Args:
        manifest: the clean manifest.
        changes: folder of the step ``retrain changes``.
        champion: where the champion's network, card and manifest are put; empty where there is none.

    Raises:
        FindingsError: retrain.classes (a class is gone), retrain.labels (new labels contradict the champion
            on images that look as before), retrain.start (there is nothing to start from).
        RetortError: when the tracker does not answer.
    """
    with step("retrain-decide", params, out, [manifest, changes / FILE], products=[champion]) as run:
        need(manifest, "validate")
        before = read_decision(changes, "retrain changes")
        at("fetching the champion")
        staged = run.product(champion)
        staged.mkdir()
        held = fetch(params.registry, staged)
        if held is None:
            decision = _from_nothing(run, params, "there is no champion yet", None)
        else:
            decision = _Comparison(run, params, manifest, held, out).decide(before)
        run.stop_on_errors()
        given = {name: getattr(before, name) for name in ("data", "code", "params", "rows")}
        given["clean"] = _fingerprint(manifest)
        decision = decision.model_copy(update=given)
        decision.write(run.product(out / FILE))
        run.page.text("What follows", f"{decision.reason}.")
        run.tracker.tags({"retrain": decision.reason})
        log.info(f"{run.name}: {decision.reason}")
        if not decision.go_on:
            remember(params.registry, Seen(**given))


def _fingerprint(manifest: Path) -> str:
    """Of the rows by content, class, split and source: the same for copies, renamed files, another order."""
    with database(manifest) as db:
        _view(db, "m", manifest)
        digest = "bit_xor(md5_number(concat_ws('|', class, split, source, content)))::varchar"
        found = db.execute(f"select count(*), {digest} from (select distinct {SAME} from m)").fetchall()  # noqa: S608
    return sha256_json(found)


def _view(db: duckdb.DuckDBPyConnection, name: str, path: Path) -> None:
    source = str(path).replace("'", "''")  # a view takes no parameters
    db.execute(f"create view {name} as select * from read_parquet('{source}')")  # noqa: S608


def _from_nothing(run: StepContext, params: DecideParams, why: str, champion: int | None) -> Decision:
    """All begins with the start weights: the champion has no part in it."""
    if params.retrain.from_original == "never":
        run.add_finding(
            "retrain.start", "error", "the champion",
            f"Nothing can learn on: {why}; and retrain.from_original is never.",
            advice="Set it to auto, or run the whole pipeline once ('dvc repro').", waivable=False,
        )  # fmt: skip
    elif champion is not None:
        run.add_finding(
            "retrain.start", "warning", f"champion, version {champion}", f"Nothing learns on from it: {why}.",
            advice="What is trained from start weights is compared with it all the same.",
        )  # fmt: skip
    reason = f"{why}: teacher and student are trained from their start weights"
    return Decision(go_on=True, reason=reason, way="original", champion=champion)


@dataclass(frozen=True)
class _Comparison:
    """The clean data beside the champion's."""

    run: StepContext
    params: DecideParams
    manifest: Path
    held: Champion
    out: Path

    def decide(self, before: Decision) -> Decision:
        version, changed = self.held.version, "which images it was made from is not known"
        fresh: pa.Table | None = None
        if self.held.manifest is not None:
            with database(self.manifest) as db:
                added, gone = self._rows(db, self.held.manifest)
                if not before.otherwise and before.clean == _fingerprint(self.manifest):
                    reason = "validation leaves exactly the images of the last retraining"
                    return Decision(go_on=False, champion=version, reason=reason)
                if not before.otherwise and not added and not gone:
                    reason = f"validation leaves exactly the images that champion v{version} was made from"
                    return Decision(go_on=False, champion=version, reason=reason)
                self._shares(db, self.held.manifest)
                fresh = self._fresh(db, self.held.manifest)
            changed = (
                f"{counted(added, 'row')} added and {counted(gone, 'row')} gone since champion v{version}"
            )
        now = manifests.names_by_label(manifests.read(self.manifest, ["label", "class_name"]))
        self._vanished(set(now.values()))
        fault = unfit(self.held.card, self.params.student, self.params.general.image_size)
        if fault:
            return _from_nothing(self.run, self.params, fault, version)
        if fresh is not None:
            self._look(fresh)
        assert self.held.card is not None
        new = sorted(set(now.values()) - set(self.held.card.class_names))
        if new:
            why = f"its head grows by {counted(len(new), 'class', 'classes')} ({_named(new)})"
            return Decision(go_on=True, reason=f"{changed}: {why}", way="expand", champion=version)
        return Decision(go_on=True, reason=f"{changed}: it learns on", way="update", champion=version)

    # --- what is in the data ---

    def _rows(self, db: duckdb.DuckDBPyConnection, known: Path) -> tuple[int, int]:
        """How many rows are new, and how many are gone, by content, class, split and source.

        Copies inside a split count once: nothing new is learnt from them.
        """
        _view(db, "m", self.manifest)
        _view(db, "before", known)

        def beyond(one: str, other: str) -> int:
            found = db.execute(
                f"select count(*) from (select {SAME} from {one} except select {SAME} from {other})"  # noqa: S608
            ).fetchall()
            return int(found[0][0])

        return beyond("m", "before"), beyond("before", "m")

    def _shares(self, db: duckdb.DuckDBPyConnection, known: Path) -> None:
        """Findings ``drift.*``: classes and their shares against the champion's data."""
        earlier, now = shares.read_baseline(db, known), shares.read_baseline(db, self.manifest)
        shares.judge(self.run, db, known, earlier, now, self.out)

    def _fresh(self, db: duckdb.DuckDBPyConnection, known: Path) -> pa.Table:
        """Real labelled rows; ``known``: champion or challenger was made from that image."""
        _view(db, "later", self.held.challenger or known)
        return db.sql(
            "select path, label, class_name, split, bytes, sha256, sha256 in (select sha256 from before "
            "union select sha256 from later) as known from m where label >= 0 and split <> 'unlabeled' "
            "and source = 'real' order by md5(sha256)"
        ).to_arrow_table()

    def _vanished(self, now: set[str]) -> None:
        """A class that the champion was taught and that has no image any more: as a rule, a lost folder."""
        taught = self.held.card.class_names if self.held.card is not None else []
        if self.held.manifest is not None:
            earlier = manifests.read(self.held.manifest, ["label", "class_name"])
            taught = sorted(manifests.names_by_label(earlier).values())
        gone = [name for name in taught if name not in now]
        if gone:
            self.run.add_finding(
                "retrain.classes", "error", _named(gone),
                f"{counted(len(gone), 'class', 'classes')} of champion v{self.held.version} "
                f"{'has' if len(gone) == 1 else 'have'} no image any more: {_named(gone)}. A training would "
                "forget what is not shown.",
                measured=len(gone), limit=0, row="5.4",
                advice="Look whether a folder is missing, or a class was renamed. Where it is gone for good, "
                "waiving goes on, and the champion's row of it stays.",
            )  # fmt: skip

    # --- what the images say ---

    def _look(self, rows: pa.Table) -> None:
        """What the champion says of new images: do they look otherwise, and does it deny their labels?"""
        card, root = self.held.card, self.params.data.root
        assert card is not None
        known = rows["known"].to_numpy(zero_copy_only=False)
        learnt = np.isin(np.array(rows["class_name"].to_pylist(), np.str_), card.class_names)
        judged = np.isin(np.array(rows["split"].to_pylist(), np.str_), ["val", "test"])
        fresh = rows.filter(pa.array(~known & learnt)).slice(0, MOST_NEW)
        # of old images those that it did not learn from: what it learnt by heart looks otherwise to it
        old = rows.filter(pa.array(known & learnt & judged)).slice(0, MOST_OLD)
        if not fresh.num_rows or not old.num_rows:
            return
        folder = self.held.folder
        new = look.ask(folder, root, fresh, "champion on new images")
        before = look.ask(folder, root, old, "champion on old images")
        moved = self._drift(before, new)
        self._labels(before, new, moved)

    def _drift(self, before: look.Answers, new: look.Answers) -> bool:
        found = look.drift(before, new, self.params.general.seed)
        if found is None:
            return False
        moved = found.p <= DRIFTED and found.distance >= MOVED
        how = "look otherwise than" if moved else "look like"
        self.run.add_finding(
            "retrain.drift", "warning" if moved else "info", "new images",
            f"They {how} those that the champion was judged on: energy distance {found.distance:.3f} "
            f"(p = {found.p:.3f}; {counted(found.images, 'image')} of each, in equal shares of its classes).",
            measured=round(found.distance, 4), limit=MOVED,
            advice="See what has changed: a camera, its light, what is before it. The table of slices in "
            "register says what it costs." if moved else "",
        )  # fmt: skip
        return moved

    def _labels(self, before: look.Answers, new: look.Answers, moved: bool) -> None:
        from scipy.stats import fisher_exact

        limit = self.params.retrain.max_disagreement
        shares = [side.wrong / len(side) for side in (before, new)]
        table = [[new.wrong, len(new) - new.wrong], [before.wrong, len(before) - before.wrong]]
        p = float(fisher_exact(table, alternative="greater").pvalue)
        denied = shares[1] - shares[0] > limit and p < SURE
        level: Level = "info" if not denied else "warning" if moved else "error"
        because = "the images look otherwise, which may be why" if moved else "the images look as before"
        self.run.add_finding(
            "retrain.labels", level, "new labels",
            f"The champion contradicts {shares[1]:.1%} of {counted(len(new), 'new label')}, and "
            f"{shares[0]:.1%} of {counted(len(before), 'old one')} that it did not learn from"
            f"{f'; {because}' if denied else ''}.",
            measured=round(shares[1] - shares[0], 4), limit=limit, row="1.1",
            advice="Look at some of them: were folders mixed up? 'retort audit' lists suspect labels. Right "
            "ones go on with the waiver." if denied else "",
        )  # fmt: skip


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:NAMED]) + more
