"""The command ``shadow``: recorded requests through champion and challenger, before the challenger serves."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.common.environment import cores
from components.common.errors import ImageError, RetortError
from components.common.object_store import CONNECTIONS
from components.common.progress import at, counted, task
from components.common.storage import atomic_path, remove, sha256_json, state_dir, write_json
from components.registry.files import CARD, PROOFS
from components.registry.versions import Versions, opened
from components.step import StepContext, step
from components.tools.params import ShadowParams
from components.tools.shadow import report
from components.tools.shadow.contender import Contender, Prepared, prepare
from components.tools.shadow.requests import Request, Requests, find

log = logging.getLogger(__name__)

STATE = "shadow"  # below .retort: answers of a run that was interrupted
BATCH = 64
BATCH_WHOLE = 8  # where whole images are kept in memory, of which one may take 256 MB
TIMED = 200  # requests that are answered alone, one after the other, for the latency
TIMED_SECONDS = 15.0  # for all of these
SCHEMA = pa.schema(
    {
        "number": pa.int64(),
        "request": pa.string(),
        "error": pa.string(),  # why it was not answered; empty where it was
        "champion_class": pa.string(),
        "champion_score": pa.float32(),
        "challenger_class": pa.string(),
        "challenger_score": pa.float32(),
        "changed": pa.bool_(),
        "difference": pa.float32(),  # the largest between two scores of a class that both know
        "champion_skew": pa.float32(),  # grey levels; see Contender.skew
        "challenger_skew": pa.float32(),
    }
)


def shadow(
    params: ShadowParams,
    places: Sequence[str],
    *,
    champion: str = "champion",
    challenger: str = "challenger",
    column: str = "",
    threads: int = 0,
    out: Path,
) -> dict[str, Any]:
    """Answer recorded requests with both models, and show every answer that changed.

    Writes ``answers.parquet`` (a row a request), ``changed.csv``, ``malformed.csv`` and ``metrics.json``,
    whose content is returned. An interrupted run goes on where it was, as long as requests and models are
    the same.

    Args:
        places: see ``requests.find``.
        champion, challenger: an alias or a version of ``registry.name``, or the folder or file of an
            exported model.
        column: of Parquet, that holds the bytes; empty: the only one that can.
        threads: of ONNX Runtime; 0: one for each processor that is ours.

    Raises:
        RetortError: when a model or the requests are missing, or none of them can be read.
    """
    with step("shadow", params, out) as run, ExitStack() as stack:
        at("looking for requests")
        requests = find(places, params.data, column)
        at("opening both models")
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        both = _contenders(params, {"champion": champion, "challenger": challenger}, scratch, threads)
        report.find_inputs(run, *both)
        state = state_dir(STATE, sha256_json([requests.key, [one.sha256 for one in both]])[:32])
        pool = stack.enter_context(ThreadPoolExecutor(max(cores(), CONNECTIONS if _remote(places) else 1)))
        _answer(requests, both, state, pool)
        answers = pq.read_table(state, schema=SCHEMA).sort_by("number")
        if answers.num_rows == pc.sum(pc.not_equal(answers["error"], "")).as_py():
            raise RetortError(
                f"{', '.join(places)}: {counted(answers.num_rows, 'request')}, and none can be read, such as "
                f"{answers['request'][0]}: {answers['error'][0]}"
            )
        at("measuring the latency")
        latency = _latency(requests, answers, both)
        summary = report.measured(answers, both, latency)
        with atomic_path(run.product(out / "answers.parquet")) as partial:
            pq.write_table(answers, partial)
        report.write_lists(run, answers, out)
        report.find_results(run, summary)
        report.show(run, answers, both, summary, _contents(run, requests, answers))
        write_json(run.product(out / "metrics.json"), summary)
        run.tracker.summary({key: value for key, value in summary.items() if isinstance(value, (int, float))})
    remove(state)
    return summary


def _remote(places: Iterable[str]) -> bool:
    return any(place.startswith("s3://") for place in places)


# --- the models --------------------------------------------------------------------------------------------


def _contenders(
    params: ShadowParams, named: dict[str, str], scratch: Path, threads: int
) -> tuple[Contender, Contender]:
    made = {}
    elsewhere = {role: name for role, name in named.items() if not _local(name)}
    for role, name in named.items():
        if role not in elsewhere:
            file = Path(name) / "model.onnx" if Path(name).is_dir() else Path(name)
            card = file.with_name("model.json")
            made[role] = Contender(role, name, file, card if card.is_file() else None, threads)
    if elsewhere:
        with opened(params.registry, "shadow") as versions:
            versions.need()
            for role, name in elsewhere.items():
                made[role] = _version(versions, role, name, scratch / role, threads)
    return made["champion"], made["challenger"]


def _local(name: str) -> bool:
    path = Path(name)
    return (path / "model.onnx").is_file() or path.suffix == ".onnx" or "/" in name


def _version(versions: Versions, role: str, name: str, folder: Path, threads: int) -> Contender:
    version = versions.get(int(name)) if name.isdecimal() else versions.holder(name)
    if version is None:
        raise RetortError(
            f"--{role} {name}: no version of '{versions.name}' is its {name}; name a version, or the "
            "folder of an exported model"
        )
    folder.mkdir()
    file = versions.download(version, "model.onnx", folder)
    if file is None:
        raise RetortError(
            f"--{role} {name}: version {version.version} of '{versions.name}' has no model.onnx that can be "
            "fetched; name another version, or the folder of an exported model"
        )
    card = versions.download(version, f"{PROOFS}/{CARD}", folder)
    return Contender(role, f"version {version.version}", file, card, threads)


# --- their answers -----------------------------------------------------------------------------------------


def _answer(
    requests: Requests, both: tuple[Contender, Contender], state: Path, pool: ThreadPoolExecutor
) -> None:
    """Answer all chunks that are not in ``state`` yet; each is put there when it is whole."""
    for other in state.parent.iterdir() if state.parent.exists() else ():
        if other != state:
            remove(other)  # of other requests, or other models
    state.mkdir(parents=True, exist_ok=True)
    missing = {chunk for chunk in range(requests.chunks) if not _part(state, chunk).exists()}
    if len(missing) < requests.chunks:
        log.info(f"shadow: {requests.chunks - len(missing)} of {requests.chunks} parts are answered already")
    size = BATCH_WHOLE if any(one.about.in_graph for one in both) else BATCH
    with task("answering requests", requests.count) as shown:
        if len(missing) < requests.chunks:
            shown.advance(sum(pq.read_metadata(file).num_rows for file in state.glob("*.parquet")))
        for chunk, wanted in requests.read(missing):
            prepared = _prepared(wanted, both, pool, 2 * size)
            rows: list[dict[str, Any]] = []
            while batch := list(islice(prepared, size)):
                rows += _compared(batch, both)
                shown.advance(len(batch))
            with atomic_path(_part(state, chunk)) as partial:
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), partial)


def _part(state: Path, chunk: int) -> Path:
    return state / f"{chunk:08d}.parquet"


def _prepared(
    requests: Sequence[Request], both: Sequence[Contender], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Prepared]:
    """Requests read and decoded by threads, ``ahead`` of them while the models are at work; in order."""
    waiting: deque[Future[Prepared]] = deque()
    for request in requests:
        waiting.append(pool.submit(prepare, request, both))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _compared(batch: Sequence[Prepared], both: tuple[Contender, Contender]) -> list[dict[str, Any]]:
    """A row for each request of a batch, as ``SCHEMA`` has it."""
    rows: list[dict[str, Any]] = [
        {"number": one.request.number, "request": one.request.name, "error": one.error} for one in batch
    ]
    good = [place for place, one in enumerate(batch) if not one.error]
    if not good:
        return rows
    prepared = [batch[place] for place in good]
    scores = [one.scores(prepared) for one in both]
    skews = [both[0].skew(prepared)]
    skews.append(skews[0] if _fed_alike(*both) else both[1].skew(prepared))
    common = [name for name in both[0].names if name in set(both[1].names)]
    shared = [
        table[:, [one.names.index(name) for name in common]] for table, one in zip(scores, both, strict=True)
    ]
    differences = np.abs(shared[0] - shared[1]).max(axis=1) if common else np.full(len(good), np.nan)
    for at_, place in enumerate(good):
        row = rows[place]
        for one, table, skew in zip(both, scores, skews, strict=True):
            best = int(table[at_].argmax())
            row[f"{one.role}_class"] = one.names[best]
            row[f"{one.role}_score"] = float(table[at_, best])
            row[f"{one.role}_skew"] = float(skew[at_])
        row["changed"] = row["champion_class"] != row["challenger_class"]
        row["difference"] = float(differences[at_])
    return rows


def _fed_alike(one: Contender, other: Contender) -> bool:
    """Whether both are fed the same, and were trained on the same."""
    said = [
        (
            each.about.in_graph,
            each.about.size,
            each.about.mean,
            each.about.std,
            each.size,
            each.mean,
            each.std,
        )
        for each in (one, other)
    ]
    return said[0] == said[1]


# --- what is shown of them ---------------------------------------------------------------------------------


def _latency(
    requests: Requests, answers: pa.Table, both: tuple[Contender, Contender]
) -> dict[str, list[float]]:
    """Seconds from bytes to answer of some requests, one at a time, both models in turn."""
    good = answers.filter(pc.equal(answers["error"], ""))["number"].to_numpy()
    chosen = good[np.unique(np.linspace(0, len(good) - 1, TIMED).astype(int))].tolist()
    found = requests.some(chosen)
    taken: dict[str, list[float]] = {one.role: [] for one in both}
    warm = 3
    until = time.monotonic() + TIMED_SECONDS
    for number in [*chosen[:warm], *chosen]:
        try:
            content = found[number].content()
        except (KeyError, ImageError):  # it was removed a moment ago
            continue
        for one in both:
            seconds = one.answer(content)
            if warm <= 0:
                taken[one.role].append(seconds)
        warm -= 1
        if time.monotonic() > until and warm < 0:
            break
    return taken


def _contents(run: StepContext, requests: Requests, answers: pa.Table) -> dict[int, bytes]:
    """The pictures of the changed answers that the page shows, by number; none where none may be shown."""
    if not run.params.report.thumbnails:
        return {}
    found = {}
    for number, request in requests.some(report.shown(answers)).items():
        try:
            found[number] = request.content()
        except ImageError:
            continue
    return found
