"""A real SDK client of the shared server."""

from collections.abc import Iterator

import pytest
import tinker

from tests.support.server import Server


@pytest.fixture(scope="module")
def service(server: Server) -> Iterator[tinker.ServiceClient]:
    """One session per test file; leaving the context ends it and closes the SDK's sockets."""
    with tinker.ServiceClient(base_url=server.url) as client:
        yield client
