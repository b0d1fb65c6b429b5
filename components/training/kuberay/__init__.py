"""``ray.address: kuberay``: a training step of the pipeline in a Ray cluster that Kubernetes makes for it.

The pipeline's pod stays small. It sends the step's inputs to ``ray.storage``, makes one RayJob whose entry
point calls the same step function there, follows it, and brings back what the step left, its report included.
"""

from components.training.kuberay.elsewhere import Scheduling, Work, run

__all__ = ["Scheduling", "Work", "run"]
