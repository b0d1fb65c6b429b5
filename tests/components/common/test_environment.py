"""Environment variables, for as long as something needs them."""

from __future__ import annotations

import os
import subprocess
import sys

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


@pytest.mark.parametrize(("own", "wanted"), [(None, "1 [1]"), ("2", "2 [2]")])
def test_libraries_that_know_no_quota_are_held_to_it(own: str | None, wanted: str) -> None:
    program = (
        "import os, numpy, threadpoolctl\n"
        "os.sched_getaffinity = lambda pid: set(range(64))  # a node of 64, a pod of one\n"
        "from components.common.environment import bound_threads\n"
        "bound_threads()\n"
        "pools = {pool['num_threads'] for pool in threadpoolctl.threadpool_info()}\n"
        "print(os.environ['OMP_NUM_THREADS'], sorted(pools))\n"
    )
    given = {**os.environ, "LOKY_MAX_CPU_COUNT": "1"}  # joblib takes it for a quota
    given.pop("OMP_NUM_THREADS", None)
    if own is not None:
        given["OMP_NUM_THREADS"] = own
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=given)
    assert done.stdout.strip() == wanted, done.stderr
