"""The gate before distillation: its rules, one file a subject, and what passed it.

``rate``, ``student``, ``teacher`` hold the rules; ``source`` reads start weights again where they came from;
``evidence`` tells trained kernels from others; ``passed`` binds distillation to what was judged.
"""

from components.training.gate.passed import FILE, checked_values, inputs, require_passed, write

__all__ = ["FILE", "checked_values", "inputs", "require_passed", "write"]
