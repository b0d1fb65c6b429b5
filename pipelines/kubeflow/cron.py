"""Cron expressions as KFP reads them: six fields, seconds first, in the dialect of robfig/cron 1.2.

A crontab's five fields are a trap there: the last field may be left out, so KFP takes five for seconds to
month, and fires at another time than was meant.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from components.common.errors import ConfigError

YEARS = 5  # within which an expression must match a time, as KFP's own parser has it
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
# what it is, from, to, names of its values
FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 6, DAYS),
)


@dataclass(frozen=True)
class Cron:
    """Times that recur.

    Attributes:
        text: the six fields.
        values: of each field, those that match.
        either: both a day of the month and a day of the week are named: a day matches by one of them.
    """

    text: str
    values: tuple[frozenset[int], ...]
    either: bool

    def times(self, after: datetime) -> Iterator[datetime]:
        """The times that match, the first after ``after``, in UTC, for five years."""
        seconds, minutes, hours, *_ = self.values
        first = after.astimezone(UTC)
        midnight = first.replace(hour=0, minute=0, second=0, microsecond=0)
        for number in range(YEARS * 366):
            day = midnight + timedelta(days=number)
            if self._on(day):
                for hour, minute, second in itertools.product(
                    sorted(hours), sorted(minutes), sorted(seconds)
                ):
                    time = day.replace(hour=hour, minute=minute, second=second)
                    if time > first:
                        yield time

    def _on(self, day: datetime) -> bool:
        *_, days, months, weekdays = self.values
        of_month, of_week = day.day in days, day.isoweekday() % 7 in weekdays
        return day.month in months and (of_month or of_week if self.either else of_month and of_week)


def parse(text: str) -> Cron:
    """Read five fields (from the minute on), or six (from the second on).

    Raises:
        ConfigError: naming the field and the value that cannot be read; when no time ever matches.
    """
    given = text.split()
    if len(given) not in (5, 6):
        raise ConfigError(
            f"--cron '{text}': expected five fields (minute, hour, day, month, day of the week: '30 3 * * 1' "
            f"is Mondays at 3:30), or six with seconds first; found {len(given)}"
        )
    fields = ["0", *given][-6:]
    values = []
    for field, (what, low, high, names) in zip(fields, FIELDS, strict=True):
        try:
            values.append(frozenset().union(*(_range(part, low, high, names) for part in field.split(","))))
        except ValueError as error:
            raise ConfigError(f"--cron '{text}': {what} '{field}': {error}") from None
    stars = [part[0] in "*?" for field in (fields[3], fields[5]) for part in field.split(",")]
    cron = Cron(" ".join(fields), tuple(values), either=not any(stars))
    if next(cron.times(datetime.now(UTC)), None) is None:
        raise ConfigError(f"--cron '{text}': no such day within {YEARS} years")
    return cron


def _range(part: str, low: int, high: int, names: tuple[str, ...]) -> range:
    """``*``, ``?``, ``3``, ``1-5``, ``mon-fri``, each with ``/step``; ``3/10`` begins at 3 and has no end."""
    span, slash, step = part.partition("/")
    begin, hyphen, end = span.partition("-")
    if slash and not (step.isdecimal() and int(step)):
        raise ValueError(f"the step '{step}' is no number above 0")
    if begin in ("*", "?"):
        if hyphen:
            raise ValueError(f"'{span}' is no range")
        first, last = low, high
    else:
        first = _number(begin, low, high, names)
        last = _number(end, low, high, names) if hyphen else high if slash else first
    if first > last:
        raise ValueError(f"{first} comes after {last}: write two ranges, with a comma between")
    return range(first, last + 1, int(step) if slash else 1)


def _number(text: str, low: int, high: int, names: tuple[str, ...]) -> int:
    if text.lower() in names:
        return low + names.index(text.lower())
    if not text.isdecimal():
        known = f", or {', '.join(names)}" if names else ""
        raise ValueError(f"'{text}' is no number{known}")
    if not low <= int(text) <= high:
        sunday = "; Sunday is 0 here" if names is DAYS and text == "7" else ""
        raise ValueError(f"{text} is not within {low} to {high}{sunday}")
    return int(text)
