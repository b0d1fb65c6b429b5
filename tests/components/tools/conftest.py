"""What the rooms of the steps prepare for their own tests: the commands work on what those steps leave."""

from tests.components.export.conftest import digits, exported_folder, trained
from tests.components.registry.conftest import prepared
from tests.components.registry.conftest import project as registered
from tests.components.training.conftest import data, params, project, teacher, weights

__all__ = [
    "data", "digits", "exported_folder", "params", "prepared", "project", "registered", "teacher", "trained",
    "weights",
]  # fmt: skip
