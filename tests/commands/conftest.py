"""Fixtures of other folders that commands need."""

from tests.engines.conftest import stand_in

__all__ = ["stand_in"]
