"""A step's frame: staged files, report, tracking. Every step function opens it and works inside."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from components.common import links
from components.common.environment import bound_threads
from components.common.errors import FindingsError, RetortError
from components.common.findings import Finding, Level, Report
from components.common.links import Link
from components.common.page import Page
from components.common.params import StepParams
from components.common.progress import at, counted, doing
from components.common.signals import stopped_by
from components.common.storage import remove, replace, sha256_file, write_json
from components.tracking import published
from components.tracking.client import public_uri
from components.tracking.run_identity import git_state
from components.tracking.tracker import Tracker
from components.tracking.versioned import kept_by_dvc

log = logging.getLogger(__name__)


class StepContext:
    """What a step works with while it runs: its report, its page, its tracker, and staged files."""

    def __init__(self, name: str, params: StepParams, out: Path, tracker: Tracker) -> None:
        self.name = name
        self.params = params
        self.out = out
        self.tracker = tracker
        self.report = Report(step=name)
        self.page = Page()
        self.before: dict[str, Link] = {}  # links of the steps that the inputs come from
        self._started = links.now()
        self._products: list[tuple[Path, Path]] = []

    def add_finding(
        self,
        rule: str,
        level: Level,
        subject: str,
        message: str,
        *,
        measured: Any = None,
        limit: Any = None,
        advice: str = "",
        row: str = "",
        waivable: bool = True,
    ) -> Finding:
        """Add a finding to the report; an error that is waived becomes a warning, if it is ``waivable``."""
        finding = Finding(
            rule=rule, level=level, subject=subject, measured=measured, limit=limit,
            message=message, advice=advice, row=row, waivable=waivable,
        )  # fmt: skip
        return self.report.add(finding, self.params.checks.waive)

    def product(self, path: Path) -> Path:
        """Where to write the product ``path`` (file, or folder to make): moved there when the step passes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.staged")
        remove(staged)
        self._products.append((staged, path))
        return staged

    def sha256(self, path: Path) -> str:
        """The sha256 of one of the step's inputs."""
        return self.report.inputs[name_of(path)]

    def stop_on_errors(self) -> None:
        """Raise FindingsError when an error was found: call it before work that errors make pointless."""
        if not self.report.passed:
            raise FindingsError(summary(self.report, self.out))

    def _publish(self) -> None:
        for staged, final in self._products:
            replace(staged, final)

    def products(self) -> list[str]:
        """The files that this step leaves outside its own folder, such as ``data/clean.parquet``."""
        return sorted(str(final) for _, final in self._products if self.out not in final.parents)

    def link(self, left: Mapping[str, str]) -> Link:
        """The step's link in the chain of proofs; ``left`` is the sha256 of each file that it leaves."""
        commit, dirty = git_state()
        parameters = self.params.model_dump(mode="json", by_alias=True)
        registry = {**parameters["registry"], "tracking_uri": public_uri(self.params.registry.tracking_uri)}
        registry.pop("notify", None)  # a webhook's address is a secret
        return Link(
            step=self.name, folder=name_of(self.out), read=self.report.inputs, left=dict(left),
            parameters={**parameters, "registry": registry}, commit=commit, dirty=dirty,
            started=self._started, finished=links.now(), **links.surroundings(),
        )  # fmt: skip

    def _discard(self, finals: bool) -> None:
        for staged, final in self._products:
            remove(staged)
            if finals:
                remove(final)


_known: ContextVar[Mapping[Path, Path]] = ContextVar("known", default={})  # noqa: B039 - never changed


@contextmanager
def known_as(names: Mapping[Path, Path]) -> Iterator[None]:
    """Call what lies at or below these places by other names: a Kubeflow artifact as DVC keeps it."""
    token = _known.set(names)
    try:
        yield
    finally:
        _known.reset(token)


def name_of(path: Path) -> str:
    """How reports and messages call a file: its path, as the step was given it, or what it is known as."""
    for place, name in _known.get().items():
        if path == place or place in path.parents:
            return str(name / path.relative_to(place))
    return str(path)


def summary(report: Report, out: Path) -> str:
    """One or two lines: the first error and how many more, and where to read on."""
    errors = report.errors()
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    first = errors[0]
    message = first.message
    if first.advice:
        message += f"{'' if message.endswith(('.', '!', '?')) else '.'} {first.advice}"
    way_out = f"; 'checks.waive: [{first.rule}]' goes on in spite of it" if first.waivable else ""
    return f"{report.step}: {first.rule}: {message}{more}\nsee {out / 'report.html'}{way_out}"


@contextmanager
def step(
    name: str,
    params: StepParams,
    out: Path,
    inputs: Sequence[Path] = (),
    keep: tuple[str, ...] = (),
    products: Sequence[Path] = (),
) -> Iterator[StepContext]:
    """Run a step that owns the folder ``out``, but for the entries in ``keep`` (other steps' own).

    Args:
        inputs: the files that the step reads; the report lists them by ``name_of``, with their sha256.
        products: what the step leaves outside ``out``.

    Both are emptied first, as DVC does before a stage: however the step ends, no later one goes on with what
    an earlier run left. On success the staged products appear under their names, beside ``report.json``,
    ``report.html`` and ``run.json`` (the id of the step's MLflow run, and its link in the chain of proofs).
    On a finding of level error, or any failure, the products are gone and ``report.json`` says
    ``passed: false``.

    Raises:
        FindingsError: after the report is written, when it holds an error.
        RetortError: before anything is removed, when that would take what is not the step's own: the files
            behind a link, or one of its inputs.
    """
    with doing(name), _framed(name, params, out, inputs, keep, products) as run:
        yield run


@contextmanager
def _framed(
    name: str,
    params: StepParams,
    out: Path,
    inputs: Sequence[Path],
    keep: tuple[str, ...],
    products: Sequence[Path],
) -> Iterator[StepContext]:
    bound_threads()
    _refuse_to_empty(out, inputs, keep, products)
    out.mkdir(parents=True, exist_ok=True)
    for old in [*(entry for entry in out.iterdir() if entry.name not in keep), *products]:
        remove(old)
    started = time.monotonic()
    tracker = Tracker(_called(name, out), params.registry)
    run = StepContext(name, params, out, tracker)
    status = "FAILED"
    failed: BaseException | None = None
    try:
        read = {path: sha256_file(path) for path in inputs if path.is_file()}
        run.report.inputs = {name_of(path): digest for path, digest in read.items()}
        run.before = links.before(read, run.report.inputs, out)
        at("opening a run in MLflow")
        tracker.start(params.model_dump(mode="json", by_alias=True), run.report.inputs)
        at("at work")
        yield run
        run.stop_on_errors()
        _write_report(run)
        run._publish()
        status = "FINISHED"
    except FindingsError as error:
        failed = error
        run._discard(finals=True)
        _write_report(run)
        raise
    except BaseException as error:
        run._discard(finals=True)
        stopped = stopped_by(error)
        if stopped is not None:
            status = "KILLED"
            raise stopped from None
        failed = error
        run.report.passed = False
        message = str(error) if isinstance(error, (RetortError, OSError)) else repr(error)
        rule = (isinstance(error, RetortError) and error.rule) or f"{name}.failed"
        run.report.findings.append(Finding(rule=rule, level="error", subject=name, message=message))
        _write_report(run)
        raise
    finally:
        seconds = time.monotonic() - started
        at("writing to MLflow")
        if status == "FINISHED":
            tracker.find()
            _write_run(run, keep)
            tracker.tags(kept_by_dvc())  # run.json is a part of it
        tracker.finish(status, seconds, out)
        if failed is not None and published.wanted():
            failed.add_note(_published(run))
        if status == "FINISHED":
            _say_done(run, seconds)


def _refuse_to_empty(
    out: Path, inputs: Sequence[Path], keep: tuple[str, ...], products: Sequence[Path]
) -> None:
    """Raise RetortError where emptying ``out`` and removing ``products`` would take what others own."""
    if out.is_symlink():
        raise RetortError(
            f"{out}: a link to {out.readlink()}; a step empties its folder first, and will not empty what a "
            "link leads to: remove the link, or link the folder above it"
        )
    if out.exists() and not out.is_dir():
        raise RetortError(f"{out}: not a folder, and the step's report goes there; move the file away")
    own = out.resolve()
    rewritten = {product.resolve() for product in products}
    for path in inputs:
        place = path.resolve()
        inside = place == own or (own in place.parents and place.relative_to(own).parts[0] not in keep)
        if inside or place in rewritten:
            raise RetortError(
                f"{path}: the step reads this file, and {'empties its folder' if inside else 'rewrites it'} "
                "at the start; keep a copy elsewhere, and name that one"
            )


def _write_report(run: StepContext) -> None:
    run.report.write(run.out / "report.json")
    run.page.write(run.out, run.report)


def _write_run(run: StepContext, keep: tuple[str, ...]) -> None:
    """Write ``run.json``: the step's run in MLflow, and its link in the chain of proofs."""
    own = sorted(
        path
        for path in run.out.rglob("*")
        if path.is_file() and path.relative_to(run.out).parts[0] not in (*keep, links.FILE)
    )
    outside = sorted(final for _, final in run._products if run.out not in final.parents)
    alone = [
        path
        for final in outside
        for path in (sorted(final.rglob("*")) if final.is_dir() else [final])
        if path.is_file()
    ]
    left = {path: sha256_file(path) for path in [*own, *alone]}
    link = run.link({name_of(path): digest for path, digest in left.items()})
    more = {**run.tracker.identity(), "made": run.products()}
    write_json(run.out / links.FILE, links.content_of(link, run.before, **more))
    links.keep(link, run.before, [left[path] for path in alone])


def _published(run: StepContext) -> str:
    """What the log of a failed step ends with, after its report was put where it outlives the pod."""
    step = _called(run.name, run.out)
    pages = [run.tracker.page(), published.publish(run.tracker.run_key(), step, run.out)]
    return published.last_lines(run.report, pages)


def _called(name: str, out: Path) -> str:
    """What a step's run is called: one step may fill 'outputs/export' and 'outputs/export/teacher'."""
    own = Path(name_of(out))
    return f"{name}-{own.name}" if own.parent.name == name else name


def _say_done(run: StepContext, seconds: float) -> None:
    counts = dict.fromkeys(("error", "warning", "info"), 0)
    for finding in run.report.findings:
        counts[finding.level] += 1
    found = f"{counted(counts['warning'], 'warning')}, {counted(counts['info'], 'note')}"
    log.info(f"{run.name}: done in {seconds:.1f} s, {found}: {run.out / 'report.html'}")


def read_run_id(out: Path) -> dict[str, Any]:
    """The MLflow identity that a finished step left in its folder; empty when there is none."""
    path = out / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
