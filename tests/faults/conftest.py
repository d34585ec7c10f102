"""One bench of commands for all classes of faults."""

import shutil

import pytest
from faults import commands


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    if not shutil.which("cc"):
        pytest.skip("no C compiler: calls cannot be made to fail")
    made = commands.Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.server.close()
