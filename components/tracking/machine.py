"""What a step's machine does meanwhile: MLflow's own monitors, sampled beside the work.

MLflow would send such samples to its server by itself; here they go through the spool, as all that a step
records, and have the names under which MLflow's pages know them (``system/cpu_utilization_percentage``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

log = logging.getLogger(__name__)

EVERY_SECONDS = 10.0  # as MLflow does; a shorter step has no samples
END_SECONDS = 5.0  # for a sample that is being taken
PREFIX = "system/"


class MachineMonitor(threading.Thread):
    """Samples CPU, memory, disk, network and GPUs until ``end``."""

    def __init__(self, record: Callable[[Mapping[str, float], int], None]) -> None:
        """``record`` takes the numbers of a sample, by MLflow's names, and the sample's own."""
        super().__init__(name="machine", daemon=True)
        self._record = record
        self._ending = threading.Event()
        self._monitors = monitors()  # imports MLflow, which no thread should do beside another

    def run(self) -> None:
        number = 0
        try:
            self._sample()  # the use of processors is that since the last look
            while not self._ending.wait(EVERY_SECONDS):
                self._record(self._sample(), number)
                number += 1
        except Exception as error:  # noqa: BLE001 - whatever a driver does, the step goes on
            log.info(f"tracking: the machine is not watched any more: {error}")

    def end(self) -> None:
        self._ending.set()
        self.join(END_SECONDS)

    def _sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"{PREFIX}{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values


def monitors() -> list[BaseMetricsMonitor]:
    """MLflow's monitors; that of GPUs where NVIDIA's library and a GPU are there."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found: list[BaseMetricsMonitor] = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        try:
            found.append(kind())
        except Exception as error:  # noqa: BLE001 - such as a machine without GPU, or without a network
            log.debug(f"{kind.__name__}: {error}")
    return found
