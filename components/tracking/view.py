"""The view in which MLflow's page shows a project's runs: with the columns that a person compares by.

MLflow shows no metric until it is chosen, and keeps views that people share as the experiment's tags: this is
one of them, in the form in which MLflow's page writes it (``persistShareState``, as of MLflow 3).
"""

from __future__ import annotations

import base64
import json
import zlib

KEY = "retort"
TAG = f"mlflow.sharedViewState.{KEY}"
QUERY = "workflowType=machine_learning"  # MLflow begins with its view on conversations and prompts
METRICS = (
    "distill.val_top1",
    "distill.val_macro_recall",
    "distill.test_top1",
    "distill.gain_val",
    "finetune.val_top1",
    "benchmark.p50_ms",
    "benchmark.size_bytes",
    "register.version",
)
TAGS = ("alias", "recommended")


def shared_view() -> str:
    """The value of ``TAG``."""
    state = {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "viewMaximized": False,
        "runListHidden": False,
        "selectedColumns": [*(f"metrics.`{name}`" for name in METRICS), *(f"tags.`{name}`" for name in TAGS)],
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "FIRST_10_RUNS",
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": None,
        "runsVisibilityMap": {},
        "isAccordionReordered": False,
    }
    packed = zlib.compress(json.dumps(state).encode())
    return f"deflate;{base64.b64encode(packed).decode()}"
