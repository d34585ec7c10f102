"""Test settings: four simulated CPU devices, rank promotion raises, and where the acceptance material lies."""

import collections
import gc
import os
import pathlib
import re
import shutil
import socket
import tempfile

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=4",
    # These emitters take half as long again to compile small programs; what a user runs has them.
    "--xla_cpu_use_fusion_emitters=false",
])  # fmt: skip

import hypothesis
import jax
import pytest
from faults import effort

from tl_jax.data import duplicates
from tl_jax.training import artifacts

jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the suite's time is compiling small programs: compile each once, and with little optimisation.
jax.config.update("jax_disable_most_optimizations", True)
_CACHE = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# A failed assertion of these helpers shows its values, as in a test file.
pytest.register_assert_rewrite("walks", "domain_cases", "small_network")
duplicates.FOLDER = pathlib.Path(_CACHE.name, "duplicates")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


EFFORT = {"few": 30, "many": 3000}  # inputs of each property


def pytest_configure(config):
    """With `-m battery` much is tried; hypothesis looks elsewhere each time then, else for the same inputs always."""
    effort.many = config.getoption("markexpr") == "battery"
    for name, count in EFFORT.items():
        unhurried = {"deadline": None, "suppress_health_check": [*hypothesis.HealthCheck], "database": None}
        hypothesis.settings.register_profile(name, max_examples=count, derandomize=name == "few", **unhurried)
    hypothesis.settings.load_profile("many" if effort.many else "few")


HERE = re.compile(r"127\..*|::1|localhost|0\.0\.0\.0")


@pytest.fixture(autouse=True, scope="session")
def _this_machine_alone():
    """Refuses a connection to another machine than this one."""
    connect, own = socket.socket.connect, HERE.fullmatch

    def checked(self, address):
        if isinstance(address, tuple) and not (own(str(address[0])) or address[0] == socket.gethostname()):
            raise PermissionError(f"no test reaches another machine: {address}")
        return connect(self, address)

    socket.socket.connect = checked
    yield
    socket.socket.connect = connect


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    """No width of whoever runs the tests (xdist sets one): what is printed into a pipe is not wrapped."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def _without_figures(request, monkeypatch):
    """No figures at the end of a run, which would take a second or two, but in tests marked `figures`."""
    if "figures" not in request.keywords:
        monkeypatch.setattr(artifacts, "draw", lambda *arguments: None)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """Of a test marked thin(n) all but the first n cases are slow. Of each test CI runs one case at least.

    So a slow case is exhaustive where the default suite has another of the same test, or where it is not the first.
    """
    seen, in_ci = collections.Counter(), set()
    names = [item.nodeid.partition("[")[0] for item in items]
    for item, name in zip(items, names, strict=True):
        seen[name] += 1
        if (thin := item.get_closest_marker("thin")) and seen[name] > thin.args[0]:
            item.add_marker(pytest.mark.slow)
        if not item.get_closest_marker("slow"):
            in_ci.add(name)
    for item, name in zip(items, names, strict=True):
        if item.get_closest_marker("slow") and not item.get_closest_marker("exhaustive"):
            if name in in_ci:
                item.add_marker(pytest.mark.exhaustive)
            in_ci.add(name)


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """Commands in which a call fails, of all classes of faults."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler: calls cannot be made to fail")
    from faults import commands

    made = commands.Bench(tmp_path_factory.mktemp("bench"))
    yield made
    made.server.close()


@pytest.fixture
def shared():
    """The folder of genuine weights and data beside the repository; skips the test where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"acceptance material is not here: {SHARED}")
    return SHARED


def pytest_collection_finish():
    """What is imported by now stays: collecting garbage in a test need not look at it, nor look often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
