"""What a person sees while workers train: their events become progress, lines and metrics."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

from components.common import progress
from components.step import StepContext
from components.training.context import Event

log = logging.getLogger(__name__)


class Listener:
    """Shows what rank 0 tells, and hands it to the tracker; the driver is the only one that writes."""

    def __init__(self, run: StepContext) -> None:
        self._run = run
        self._stack = ExitStack()
        self._task: progress.Task | None = None
        self._seen: set[tuple[str, int]] = set()
        self._found: set[str] = set()  # rules of the findings that workers have told
        self._unsaid = ""  # the last epoch's line, while it was not its turn
        self.stopped: Event | None = None
        self.resumed = False  # so that what it takes is not all that was expected
        self.seconds: list[float] = []  # of training, by epoch
        self.waiting: list[float] = []  # ... that were spent waiting for images
        self.images = 0.0
        self.remedy = ""

    def __call__(self, event: Event) -> None:
        getattr(self, f"_on_{event['kind']}")(event)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: Any) -> None:
        self._say_last()
        self._stack.__exit__(*error)  # an interrupted task does not end at 100 %

    def _say_last(self) -> None:
        """What a phase ended with is said, whether it is a line's turn or not."""
        if self._unsaid:
            log.info(self._unsaid)
        self._unsaid = ""

    def _on_phase(self, event: Event) -> None:
        self._say_last()
        self._stack.close()
        progress.at("judging the networks, keeping the checkpoint")  # what is done after the last step
        title = f"{self._run.name}: {event['name']} ({event['unit']})"
        self._task = self._stack.enter_context(progress.task(title, event["total"]))
        self._task.update(event.get("done", 0))

    def _on_progress(self, event: Event) -> None:
        if self._task is not None:
            self._task.update(event["done"], event["note"])

    def _on_estimate(self, event: Event) -> None:
        seconds = duration(event["seconds"])
        name = event["name"].removeprefix(f"{self._run.name}: ")  # a phase may be called as the step is
        if event["again"]:  # the first ones of a short training are soon corrected
            progress.log_if_due(
                f"{self._run.name}: {name}: {seconds} more from here, by what was measured since"
            )
        else:
            log.info(f"{self._run.name}: {name} will take about {seconds}")

    def _on_note(self, event: Event) -> None:
        log.info(f"{self._run.name}: {event['said']}")

    def _on_finding(self, event: Event) -> None:
        """What workers have found out; told again after a restart."""
        if event["rule"] not in self._found:
            self._found.add(event["rule"])
            self._run.add_finding(
                event["rule"], event["level"], self._run.name, event["message"],
                measured=event["measured"], advice=event["advice"], row="2.3",
            )  # fmt: skip

    def _on_started(self, event: Event) -> None:
        if self._seen:
            log.warning(
                f"{self._run.name}: a worker was lost before Ray knew of a checkpoint; training starts over"
            )

    def _on_resumed(self, event: Event) -> None:
        self.resumed = True
        done = len(self._seen)
        why = "a worker was lost" if done else "an earlier run was interrupted"
        log.info(
            f"{self._run.name}: {why}; going on from its last checkpoint "
            f"(phase {event['phase'] + 1}, after epoch {event['epoch']})"
        )

    def _on_epoch(self, event: Event) -> None:
        row = event["row"]
        key = row["phase"], row["epoch"]
        if key in self._seen:  # told again after a restart
            return
        self._seen.add(key)
        line = (
            f"{self._run.name}: {row['phase']} epoch {row['epoch']}: loss {row['train_loss']:.4f}, "
            f"validation loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2%}"
        )
        self._unsaid = "" if progress.log_if_due(line) else line
        numbers = {name: row[name] for name in row if name not in ("phase", "epoch")}
        self._run.tracker.metrics(
            {f"{row['phase']}.{name}": value for name, value in numbers.items()}, step=row["epoch"]
        )

    def _on_speed(self, event: Event) -> None:
        """How fast an epoch went: a number of this run only, so it is no part of the history."""
        self.seconds.append(event["seconds"])
        self.waiting.append(event["waiting"] * event["seconds"])
        self.images += event["images_per_second"] * event["seconds"]
        self.remedy = event["remedy"]
        numbers = {name: event[name] for name in ("images_per_second", "waiting")}
        self._run.tracker.metrics(
            {f"speed.{name}": value for name, value in numbers.items()}, step=len(self.seconds)
        )

    def _on_left_off(self, event: Event) -> None:
        log.info(
            f"{self._run.name}: {event['phase']}: left off in epoch {event['epoch']} after step "
            f"{event['step']}; the same command goes on from there"
        )

    def _on_stopped(self, event: Event) -> None:
        self.stopped = event


def duration(seconds: float) -> str:
    """Seconds or minutes, as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min"
