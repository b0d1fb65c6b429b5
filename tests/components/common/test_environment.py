"""Environment variables, for as long as something needs them."""

from __future__ import annotations

import os

import pytest

from components.common.environment import environment


def test_variables_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETORT_TEST_OLD", "old")
    monkeypatch.delenv("RETORT_TEST_NEW", raising=False)
    with pytest.raises(ZeroDivisionError), environment({"RETORT_TEST_OLD": "a", "RETORT_TEST_NEW": "b"}):
        assert (os.environ["RETORT_TEST_OLD"], os.environ["RETORT_TEST_NEW"]) == ("a", "b")
        del os.environ["RETORT_TEST_NEW"]  # a library may take back what it found there
        os.environ["RETORT_TEST_OLD"] = "c"
        _ = 1 / 0
    assert os.environ["RETORT_TEST_OLD"] == "old"
    assert "RETORT_TEST_NEW" not in os.environ
