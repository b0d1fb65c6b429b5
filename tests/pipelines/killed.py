"""A step that is killed. No kfp is imported here: where a component runs, kfp has no decorators."""

import json
import os
import signal

from components.common.params import Registry
from components.tracking.tracker import Tracker


def die() -> None:
    """Begin a step, and be killed in its midst, as for want of memory."""
    registry = Registry.model_validate(json.loads(os.environ["RETORT_SETTINGS"])["registry"])
    Tracker("dying", registry).start({}, {})
    os.kill(os.getpid(), signal.SIGKILL)
