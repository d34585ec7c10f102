"""A full disk, a faulty one and a read-only one, at any call that changes files: one line says so, nothing is lost."""

import errno
import re
import subprocess

import pytest
from faults import effort
from faults.commands import QUICK, TASKS

pytestmark = pytest.mark.battery


@pytest.mark.parametrize("name", effort.of(TASKS, QUICK))
def test_a_call_that_fails_ends_a_task_in_one_line_and_nothing_is_lost(bench, name):
    for fault in bench.faults(name, (errno.ENOSPC, errno.EIO, errno.EROFS), effort.amount(3, 32)):
        effort.tried("disk", bench.survives(name, fault))


@pytest.fixture
def small_disk(bench, tmp_path):
    """Mounts a disk of so many KiB where tasks work; skips where that is not allowed."""
    mounted = []

    def mount(size):
        release()
        bench.work.mkdir(exist_ok=True)
        options = ["-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(bench.work)]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        mounted.append(True)

    def release():
        if mounted:
            subprocess.run(["umount", "-l", str(bench.work)], check=True)
            mounted.clear()

    mount.release = release
    yield mount
    release()


@pytest.mark.parametrize("name", effort.of(TASKS, QUICK))
def test_a_disk_that_is_too_small_is_named_and_a_larger_one_is_enough(bench, name, small_disk):
    whole = bench.whole(name)
    needed = sum(path.stat().st_size for path in bench.work.rglob("*") if path.is_file()) // 1024
    for part in range(1, effort.amount(2, 6)):
        size = 64 + needed * part // effort.amount(2, 6)
        small_disk(size)
        try:
            bench.begin(name)
        except OSError as error:  # what the task begins with does not fit
            assert error.errno == errno.ENOSPC or "No space left" in str(error)
            continue
        ended = bench.run(name)
        told = f"{name} on {size} of {needed} KiB: code {ended.code}\n{ended.output[-3000:]}"
        assert ended.code in (0, 2) and "Traceback" not in ended.output, told
        error = ended.output.rpartition("error: ")[2]
        assert ended.code == 0 or re.search("No space left on device|[0-9,]+ (are|bytes) free", error), told
        subprocess.run(["mount", "-o", "remount,size=1g", str(bench.work)], check=True)
        again = bench.run(name)
        assert again.code == 0, f"{told}\nthen {again.output[-3000:]}"
        assert bench.left(name) == whole, told
        effort.tried("disk", "refused in one line, went on" if ended.code else "without effect")
