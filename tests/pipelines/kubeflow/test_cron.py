"""Cron expressions as KFP reads them; expected times are worked out by hand."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

import pytest

from components.common.errors import ConfigError
from pipelines.kubeflow.cron import parse

SATURDAY = datetime(2026, 11, 28, 6, 30, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30 3 * * 1", ["2026-11-30 03:30:00", "2026-12-07 03:30:00", "2026-12-14 03:30:00"]),
        ("0 30 3 * * mon", ["2026-11-30 03:30:00", "2026-12-07 03:30:00", "2026-12-14 03:30:00"]),
        ("30 6 * * *", ["2026-11-29 06:30:00", "2026-11-30 06:30:00", "2026-12-01 06:30:00"]),
        ("*/20 6-7 * * ?", ["2026-11-28 06:40:00", "2026-11-28 07:00:00", "2026-11-28 07:20:00"]),
        ("15/30 8 * * *", ["2026-11-28 08:15:00", "2026-11-28 08:45:00", "2026-11-29 08:15:00"]),
        ("10,40 0 12 31 dec *", ["2026-12-31 12:00:10", "2026-12-31 12:00:40", "2027-12-31 12:00:10"]),
        ("0 0 29 2 *", ["2028-02-29 00:00:00"]),
        # both a day of the month and one of the week: either will do, as in crontab
        ("0 0 1 * 0", ["2026-11-29 00:00:00", "2026-12-01 00:00:00", "2026-12-06 00:00:00"]),
        # ... but not where one of them begins with a star
        ("0 0 */2 * 0", ["2026-11-29 00:00:00", "2026-12-13 00:00:00", "2026-12-27 00:00:00"]),
        ("0 0 * * fri-sat", ["2026-12-04 00:00:00", "2026-12-05 00:00:00", "2026-12-11 00:00:00"]),
    ],
)
def test_the_next_times(text: str, expected: list[str]) -> None:
    found = itertools.islice(parse(text).times(SATURDAY), 3)
    assert [f"{time:%Y-%m-%d %H:%M:%S}" for time in found][: len(expected)] == expected


def test_five_fields_are_sent_as_six() -> None:
    assert parse("30 3 * * 1").text == "0 30 3 * * 1"
    assert parse(" 5  30 3 * *   1 ").text == "5 30 3 * * 1"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("30 3 * *", "expected five fields .* found 4"),
        ("@daily", "expected five fields .* found 1"),
        ("60 3 * * 1", "minute '60': 60 is not within 0 to 59"),
        ("0 24 * * *", "hour '24': 24 is not within 0 to 23"),
        ("0 3 * * 7", "day of the week '7': 7 is not within 0 to 6; Sunday is 0 here"),
        ("0 3 * * mondays", "day of the week 'mondays': 'mondays' is no number, or sun, mon"),
        ("0 3 0 * *", "day of the month '0': 0 is not within 1 to 31"),
        ("0 3 * 13 *", "month '13': 13 is not within 1 to 12"),
        ("0 3 * * 5-1", "day of the week '5-1': 5 comes after 1"),
        ("*/0 3 * * *", "minute '\\*/0': the step '0' is no number above 0"),
        ("1,,2 3 * * *", "minute '1,,2': '' is no number"),
        ("-5 3 * * *", "minute '-5': '' is no number"),
        ("0 3 31 2 *", "no such day within 5 years"),
    ],
)
def test_a_typo_names_the_field(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(text)
