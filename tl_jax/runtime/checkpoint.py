"""Checkpoints: asynchronous, hashed leaf by leaf, verified when read. The only file that imports orbax."""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tl_jax.core import messages, trees
from tl_jax.runtime import leaves


class Restored(NamedTuple):
    """A checkpoint that was read and found intact, and what is wrong with the newer ones that were not."""

    step: int
    state: Any
    meta: dict[str, Any]
    damaged: list[str]


class OtherValues(ValueError):
    """A checkpoint is intact, but what it leaves out has other values in this run than in that which saved it."""


class Checkpoints:
    """The checkpoints of one run, `folder/<step>`; close it (or leave its `with`) before the program ends.

    A checkpoint holds the state and `meta`: plain JSON data about the run, to which the sha256 of every leaf is added.
    orbax keeps the steps: it has each written into a folder of another name, and renames that when it is complete.
    resting: `{path: sha256}` of the leaves that are the same in every state of the run, and in whatever state is given
    to `restore`. They are not saved: a restored state has them from there, if they have the hashes of then.
    """

    def __init__(self, folder: pathlib.Path, resting: Mapping[str, str] | None = None):
        self._resting = resting or {}
        self._keep: Collection[int] = ()
        self._folder = folder.absolute()
        self._copy: dict[str, jax.Array] = {}
        options = ocp.CheckpointManagerOptions(create=True, cleanup_tmp_directories=True, preservation_policy=self)
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

    def prepare(self, state: Any) -> None:
        """Compiles and allocates what `save` needs, so that the first save takes no longer than the others."""
        for _ in range(2):  # the first allocates, those after it copy into what is there
            self._copy = _copy_of(self._saved(state), self._copy)
        self._give_back()

    def save(self, step: int, state: Any, meta: Mapping[str, Any], keep: Collection[int] = ()) -> None:
        """Starts to save in the background, after the save before it has ended; the state may be donated at once.

        Of the older checkpoints, the newest and the steps in `keep` stay; the newest stays because this one is not
        committed yet. Raises OSError, before anything is written, where the disk has no room.
        """
        self.wait()
        saved, flat = self._saved(state), trees.flatten(state)
        needed = sum(leaf.nbytes for leaf in saved.values())
        free = shutil.disk_usage(self._folder).free
        if free < 1.05 * needed + 2**20:
            raise OSError(
                f"no room for the checkpoint of step {step} in {self._folder}: it needs {needed:,} bytes, {free:,} are "
                f"free. Make room and start the same command again; it resumes from step {max(self.steps(), default=0)}"
            )
        self._copy, self._keep = _copy_of(saved, self._copy), keep
        text = json.dumps({**meta, "step": step})  # now: the caller's rows go on growing
        elsewhere = {path: {**_form(flat[path]), "sha256": sha256} for path, sha256 in self._resting.items()}
        items = ocp.args.Composite(state=_Save(self._copy, text, elsewhere))
        older = self.steps()
        if not self._manager.save(step, args=items):
            raise ValueError(
                f"{self._folder} has checkpoints beyond step {step}, {older[-1:]}: they are not of this run"
            )
        self._give_back()

    def _saved(self, state: Any) -> dict[str, jax.Array]:
        return {path: leaf for path, leaf in trees.flatten(state).items() if path not in self._resting}

    def _give_back(self) -> None:
        if jax.default_backend() != "cpu":  # there alone fresh memory is slow
            self._copy = {}

    def should_preserve(self, checkpoints: list, *, context: Any) -> list[bool]:
        """For orbax, which deletes the others once the newest is committed."""
        newest = sorted(info.step for info in checkpoints)[-2:]
        return [info.step in newest or info.step in self._keep for info in checkpoints]

    def wait(self) -> None:
        """Waits for the save in flight; raises what became of it."""
        self._manager.wait_until_finished()

    def saving(self) -> bool:
        """Whether a save is in flight."""
        return self._manager.is_saving_in_progress()

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON data of a checkpoint; raises ValueError where it cannot be read."""
        index = self._index(step)
        return {**index.meta, "hashes": index.hashes}

    def _index(self, step: int) -> leaves.Index:
        name = f"checkpoint {self._folder / str(step)}"
        try:
            index = leaves.read_index(self._folder / str(step) / "state")
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} cannot be read: {_first_line(error)}") from error
        if index.meta.get("step") != step:
            raise ValueError(f"{name} is damaged: its meta data are not those of step {step}")
        return index

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, with the structure, shapes and placement of `like`, and what the checkpoint leaves out.

        Raises ValueError unless every leaf has the hash that it was saved with; where `like` is at fault, OtherValues.
        """
        name, index = f"checkpoint {self._folder / str(step)}", self._index(step)
        flat = trees.flatten(like)
        expected = {path: "{dtype}{shape}".format(**_form(leaf)) for path, leaf in flat.items()}
        found = {path: f"{entry['dtype']}{entry['shape']}" for path, entry in index.leaves.items()}
        if changed := messages.difference(found, expected, limit=3):
            raise ValueError(f"{name} has other leaves than this run (saved -> expected):\n" + "\n".join(changed))
        saved = {path: entry["sha256"] for path, entry in index.leaves.items() if entry["offset"] is None}
        if changed := messages.difference(saved, trees.leaf_hashes({path: flat[path] for path in saved}), limit=3):
            raise OtherValues(
                f"{name} leaves out what never trains, which has other values in this run (sha256, saved -> now):\n"
                + "\n".join(changed)
                + "\nLikely another weight file, or another version of what reads it; resume with those of then, or "
                "choose another workdir"
            )
        try:
            arrays = leaves.read(self._folder / str(step) / "state", index)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is damaged, {error}") from error

        def put(array: np.ndarray, leaf: jax.Array) -> jax.Array:
            if leaf.is_fully_addressable:
                return jax.device_put(array, leaf.sharding, may_alias=False)  # a step may then reuse the memory
            return jax.make_array_from_callback(array.shape, leaf.sharding, lambda part: array[part])

        restored = [put(arrays[path], leaf) if path in arrays else leaf for path, leaf in flat.items()]
        return jax.tree.unflatten(jax.tree.structure(like), restored)

    def restore_latest(self, like: Callable[[int], Any]) -> Restored | None:
        """The newest intact checkpoint, or None where the run has none yet; like(step) has the structure of its state.

        Raises ValueError where there are checkpoints and none is intact: starting over must be somebody's decision;
        and OtherValues as `restore` does.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, like(step))
            except OtherValues:
                raise
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


def _copy_of(state: Any, old: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A copy of one replica of a state, `{path: leaf}`, in the memory of the copy before it; does not wait for it.

    Where the device has no room for it, the copy is in the host's memory, and waited for.
    """
    flat = {path: _one_replica(leaf) for path, leaf in trees.flatten(state).items()}
    fits = jax.tree.map(jnp.shape, old) == jax.tree.map(jnp.shape, flat) and all(
        isinstance(x, jax.Array) and x.dtype == flat[path].dtype for path, x in old.items()
    )
    try:
        copy, _ = _copy_into(old, flat) if fits else _copy_fresh(flat)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return jax.tree.map(lambda leaf: np.array(leaf), flat)
    return copy


def _one_replica(leaf: jax.Array) -> jax.Array:
    if not leaf.is_fully_replicated:  # cut over devices: every one gets the whole, all processes take part
        leaf = jax.device_put(leaf, jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec()))
    return leaf.addressable_data(0)


def _copies(flat: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    # XLA runs cheap programs on the calling thread, and takes a gigabyte of copies for one, but not a matrix product.
    number = next(iter(flat.values())).reshape(-1)[0]
    work = jnp.full((64, 64), number.astype(jnp.float32))
    return jax.tree.map(jnp.copy, flat), work @ work


def _copies_into(old: dict[str, jax.Array], flat: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    return _copies(flat)


_copy_fresh = jax.jit(_copies)
_copy_into = jax.jit(_copies_into, donate_argnums=0, keep_unused=True)


@dataclasses.dataclass
class _Save(ocp.args.CheckpointArgs):
    leaves: Mapping[str, jax.Array]
    meta: str
    elsewhere: Mapping[str, Mapping[str, Any]]


class _Handler(ocp.AsyncCheckpointHandler):
    """How orbax has a state written: on threads that take only what time training leaves."""

    async def async_save(self, directory: Any, args: _Save) -> list[Any]:
        async def write() -> None:
            if sys.platform == "linux":  # there the priority is each thread's own, and inherited by those it starts
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            # Views of what is in the host's memory already; they must be gone before the copy is written over.
            arrays = {path: np.asarray(_view(leaf)) for path, leaf in args.leaves.items()}
            leaves.write(pathlib.Path(directory), arrays, args.meta, args.elsewhere)

        if jax.process_index():
            return []
        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="checkpoint")]

    def save(self, directory: Any, args: _Save) -> None:
        raise NotImplementedError("saved in the background only")

    def restore(self, directory: Any, args: Any = None) -> None:
        raise NotImplementedError("read by Checkpoints.restore")


ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)(_Save)


def _view(leaf: jax.Array | np.ndarray) -> Any:
    return leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf


def _form(leaf: jax.Array) -> dict[str, Any]:
    return {"dtype": leaf.dtype.name, "shape": list(leaf.shape)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
