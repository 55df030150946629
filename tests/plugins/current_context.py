"""A plugin of pytest (`-p tests.plugins.current_context`): tests run with a context of the first GPU current.

As where ONNX Runtime computes on one; the GPU may be the stand-in.
"""

from collections.abc import Iterator

import pytest

from umv2_export.gpu.driver import open_device

__all__: list[str] = []


@pytest.fixture(autouse=True, scope="session")
def _current_context() -> Iterator[None]:
    with open_device():
        yield
