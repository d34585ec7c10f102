"""Keeping compiled programs from one start to the next."""

import contextlib
import hashlib
import os
import pathlib
import stat

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
    with contextlib.suppress(ImportError, AttributeError, TypeError):  # another version of jax keeps them unchecked
        from jax._src import compilation_cache as programs  # there is no public way

        programs._cache, programs._cache_initialized = _checked(folder), True


def _mend(folder: pathlib.Path) -> bool:
    """Removes notes of use without a program, and programs without a note, at which jax stumbles; False: no lock.

    jax writes a program, then when it was last used ("atime"): a process can die between the two.
    """
    import filelock

    try:
        with filelock.FileLock(folder / ".lockfile", timeout=SECONDS):
            names = {path.name for path in folder.iterdir()}
            for name in names:
                key, _, kind = name.rpartition("-")
                if {"atime": f"{key}-cache", "cache": f"{key}-atime"}.get(kind, name) not in names:
                    (folder / name).unlink()
    except filelock.Timeout:
        return True  # another process does it
    except OSError:
        return False
    return True


def _checked(folder: pathlib.Path):
    """jax's store of programs, with the sha256 of each behind it; what has another when it is read is removed."""
    from jax._src import lru_cache

    class Checked(lru_cache.LRUCache):
        def get(self, key: str) -> bytes | None:
            found = super().get(key)
            if found is None or hashlib.sha256(found[:-32]).digest() == found[-32:]:
                return found and found[:-32]
            with self.lock:
                for kind in ("cache", "atime"):
                    (folder / f"{key}-{kind}").unlink(missing_ok=True)
            return None  # it is compiled anew, and kept

        def put(self, key: str, value: bytes) -> None:
            super().put(key, value + hashlib.sha256(value).digest())

    return Checked(str(folder), max_size=BYTES)
