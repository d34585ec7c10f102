"""Checkpoints: asynchronous, hashed leaf by leaf, verified when read. The only file that imports orbax."""

import pathlib
import shutil
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from tl_jax import trees


class Restored(NamedTuple):
    """A checkpoint that was read and found intact, and what is wrong with the newer ones that were not."""

    step: int
    state: Any
    meta: dict[str, Any]
    damaged: list[str]


class Checkpoints:
    """The checkpoints of one run, `folder/<step>`; close it (or leave its `with`) before the program ends.

    A checkpoint holds the state and `meta`: plain JSON data about the run, to which the sha256 of every leaf is added.
    """

    def __init__(self, folder: pathlib.Path):
        options = ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True)
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the save in flight."""
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a committed checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: Mapping[str, Any], keep: Collection[int] = ()) -> None:
        """Starts to save in the background, after the save before it has ended.

        Of the older checkpoints, the newest and the steps in `keep` stay; the newest stays because this one is not
        committed yet. Raises OSError, before anything is written, where the disk has no room.
        """
        self._manager.wait_until_finished()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._folder).free
        if free < 1.05 * needed + 2**20:
            raise OSError(
                f"no room for the checkpoint of step {step} in {self._folder}: it needs {needed:,} bytes, {free:,} are "
                f"free. Make room and start the same command again; it resumes from step {max(self.steps(), default=0)}"
            )
        meta = {**meta, "step": step, "hashes": trees.leaf_hashes(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        older = self.steps()
        if not self._manager.save(step, args=items):
            raise ValueError(
                f"{self._folder} has checkpoints beyond step {step}, {older[-1:]}: they are not of this run"
            )
        for old in older[:-1]:
            if old not in keep and old != step:
                self._manager.delete(old)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON data of a checkpoint; raises ValueError where it cannot be read."""
        name = f"checkpoint {self._folder / str(step)}"
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except Exception as error:
            raise ValueError(f"{name} cannot be read: {_first_line(error)}") from error
        if not isinstance(meta, dict) or meta.get("step") != step:
            raise ValueError(f"{name} is damaged: its meta data are not those of step {step}")
        return meta

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, with the structure, shapes and placement of `like`.

        Raises ValueError unless every leaf has the hash that it was saved with.
        """
        meta = self.meta(step)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            state = self._manager.restore(step, args=items)["state"]
        except Exception as error:
            raise ValueError(f"checkpoint {self._folder / str(step)} cannot be read: {_first_line(error)}") from error
        if changed := trees.difference(meta["hashes"], trees.leaf_hashes(state), limit=3):
            listing = "\n".join(changed)
            raise ValueError(
                f"checkpoint {self._folder / str(step)} is damaged, leaves differ from what was saved:\n{listing}"
            )
        return state

    def restore_latest(self, like: Callable[[int], Any]) -> Restored | None:
        """The newest intact checkpoint, or None where the run has none yet; like(step) has the structure of its state.

        Raises ValueError where there are checkpoints and none is intact: starting over must be somebody's decision.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, like(step))
            except ValueError as error:
                damaged.append(str(error))
                continue
            for newer in [s for s in self.steps() if s > step]:
                self._manager.delete(newer)
            return Restored(step, state, self.meta(step), damaged)
        if damaged:
            listing = "\n".join(damaged)
            raise ValueError(
                f"no checkpoint in {self._folder} is intact; move the folder away to start over:\n{listing}"
            )
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
