"""The small pair of models."""

from tests.models.conftest import pair  # noqa: F401
from tests.ops.conftest import poisoned_memory  # noqa: F401
