"""The small pair of models."""

from tests.models.conftest import pair  # noqa: F401
