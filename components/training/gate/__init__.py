"""The gate before distillation: its rules, one file a subject, and what passed it.

``rate``, ``student``, ``teacher`` hold the rules; ``source`` reads start weights again where they came from;
``evidence`` tells trained kernels from others; ``passed`` binds distillation to what was judged.
"""

from components.training.gate.passed import FILE, demand, inputs, judged, write

__all__ = ["FILE", "demand", "inputs", "judged", "write"]
