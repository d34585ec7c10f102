"""Keeping compiled programs from one start to the next."""

import os
import pathlib
import stat

FOLDER = pathlib.Path(".cache", "tl_jax", "compiled")  # under the user's home
BYTES = 2**31  # beyond which the programs that were used least lately are removed


def keep_compiled_programs() -> None:
    """Lets a program that was compiled once start at once the next time; JAX_COMPILATION_CACHE_DIR takes precedence.

    Whoever can write to the folder can run code here, so it is private, or not used.
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
    if not all(_is_private(path) for path in (folder.parent, folder)):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", BYTES)
    # A run has some ten small programs, which together take as long to compile as a large one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # jax looks once; a notebook may have compiled something already


def _is_private(folder: pathlib.Path) -> bool:
    """Whether it is a folder of this user, no link to one, that nobody else can write to."""
    facts = folder.lstat()
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022
