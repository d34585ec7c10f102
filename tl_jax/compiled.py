"""Keeping compiled programs from one start to the next."""

import os
import pathlib


def keep_compiled_programs() -> None:
    """Lets a program that was compiled once start at once the next time; JAX_COMPILATION_CACHE_DIR takes precedence.

    Whoever can write to the folder can run code here, so it is private, or not used.
    """
    import jax

    folder = pathlib.Path.home() / ".cache" / "tl_jax" / "compiled"
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
    except OSError:
        return  # no home to write to: compile every time
    if facts.st_uid == os.getuid() and not facts.st_mode & 0o022:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", 2**31)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
