"""What the machine has."""

import contextlib
import os
import pathlib

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1


def memory() -> int:
    """The bytes of memory that this process may use: those of the machine, or fewer in a container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(pathlib.Path(path).read_text()))
    return min(limits)


def cores() -> tuple[int, ...]:
    """The cores that this process may use; macOS does not tell."""
    return tuple(sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)))
