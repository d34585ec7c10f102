"""Keeping compiled programs from one start to the next."""

import os
import pathlib
import stat
import zlib

FOLDER = pathlib.Path(".cache", "tl_jax", "compiled")  # under the user's home
SECONDS = 5  # to wait for other processes
BYTES = 2**31  # beyond which the programs that were used least lately are removed


def keep_compiled_programs() -> None:
    """Lets a program that was compiled once start at once the next time; JAX_COMPILATION_CACHE_DIR takes precedence.

    Whoever can write to the folder can run code here, so it is not used unless it is private and can be locked.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_compilation_cache_dir:
        return
    folder = pathlib.Path.home() / FOLDER
    try:
        for path in (folder.parents[1], folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # no home to write to: compile every time
    for facts in (folder.parent.lstat(), folder.lstat()):
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
            return  # a link, of another user, or others can write to it
    if not _mend(folder):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", BYTES)
    # A run has some ten small programs, which together take as long to compile as a large one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # jax looks once; a notebook may have compiled something already


def _mend(folder: pathlib.Path) -> bool:
    """Removes programs that a process died writing, which jax would neither read nor replace; False: no lock to be had.

    jax writes a program, then when it was last used ("atime"): one without that was not finished. Another process may
    have read an unfinished one and noted its use: so each is looked at once, and then marked as read-only and of time
    0. One that is marked and has another time was changed since.
    """
    import filelock

    try:
        with filelock.FileLock(folder / ".lockfile", timeout=SECONDS):
            facts = {path.name: path.stat() for path in folder.iterdir()}
            for name in facts:
                key, _, kind = name.rpartition("-")
                if kind == "atime" and f"{key}-cache" not in facts:
                    (folder / name).unlink()
                elif kind == "cache" and not (f"{key}-atime" in facts and _is_whole(folder / name, facts[name])):
                    (folder / name).unlink()
                    (folder / f"{key}-atime").unlink(missing_ok=True)
    except filelock.Timeout:
        return True  # another process does it
    except OSError:
        return False
    return True


def _is_whole(program: pathlib.Path, facts: os.stat_result) -> bool:
    """Whether a program ends where its compression says; of zstandard, if that is installed, the beginning must do."""
    if not facts.st_mode & stat.S_IWUSR:
        return not facts.st_mtime_ns
    data, stream = program.read_bytes(), zlib.decompressobj()
    try:
        stream.decompress(data)
        whole = stream.eof
    except zlib.error:
        whole = data.startswith(b"\x28\xb5\x2f\xfd")
    if whole:
        os.utime(program, (0, 0))
        program.chmod(stat.S_IRUSR)
    return whole
