"""Checkpoints: asynchronous, hashed leaf by leaf, verified when read. The only file that imports orbax."""

import contextlib
import dataclasses
import json
import logging
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

from tl_jax.core import files, messages, trees
from tl_jax.runtime import leaves, wall

TIMEOUT = 10**8  # seconds of a save; orbax measures it with the clock of the day, which jumps when a laptop wakes up
# orbax prints each error of a save three times, with tracebacks; `wait` and `close` raise it.
logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))


class Restored(NamedTuple):
    """An intact checkpoint, and what is wrong with the newer ones."""

    step: int
    state: Any
    meta: dict[str, Any]
    damaged: list[str]


class OtherValues(ValueError):
    """A checkpoint is intact, but what it leaves out has other values in this run."""


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run, `folder/<step>`; close it (or end its `with`) before the program ends.

    A checkpoint holds the state and `meta`: plain JSON data about the run, to which the sha256 of every leaf is added.
    orbax has each step written into a folder of another name, and renames that when it is complete.
    constant: `{path: sha256}` of the leaves that are the same in every state of the run. They are not saved: a restored
    state has those of the state given to `restore`, which must have the same hashes.
    """

    def __init__(self, folder: pathlib.Path, constant: Mapping[str, str] | None = None):
        self._constant = constant or {}
        self._keep: Collection[int] = ()
        self._folder = folder.absolute()
        self._copy: dict[str, jax.Array] = {}
        options = ocp.CheckpointManagerOptions(
            create=True, cleanup_tmp_directories=True, preservation_policy=self,
            async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT),
        )  # fmt: skip
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __exit__(self, *_) -> None:
        self.close()

    @wall.timed("checkpoints")
    def close(self) -> None:
        """Waits for the save in flight."""
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a committed checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    @wall.timed("checkpoints")
    def prepare(self, state: Any) -> None:
        """Compiles and allocates what `save` needs, so that the first save takes no longer than the others."""
        for _ in range(2):  # the first allocates, those after it copy into what is there
            self._copy = _copy_of(self._saved(state), self._copy)
        self._free_copy()

    @wall.timed("checkpoints")
    def save(self, step: int, state: Any, meta: Mapping[str, Any], keep: Collection[int] = ()) -> None:
        """Starts to save in the background, after the save before it has ended; the state may be donated at once.

        The newest of the older checkpoints and the steps in `keep` stay. Raises OSError first where the disk is full.
        """
        self.wait()
        saved, flat, older = self._saved(state), trees.flatten(state), self.steps()
        needed = sum(leaf.nbytes for leaf in saved.values()) * 21 // 20 + 2**20  # with what is written beside them
        if (free := shutil.disk_usage(self._folder).free) < needed:
            full = f"no room for the checkpoint of step {step} in {self._folder}: it needs {needed:,} bytes"
            hint = f"Make room and start the same command again; it resumes from step {max(older, default=0)}"
            raise files.no_room(f"{full}, {free:,} are free. {hint}")
        self._copy, self._keep = _copy_of(saved, self._copy), keep
        text = json.dumps({**meta, "step": step})  # now: the caller's rows go on growing
        elsewhere = {path: {**_form(flat[path]), "sha256": sha256} for path, sha256 in self._constant.items()}
        if not self._manager.save(step, args=ocp.args.Composite(state=_Save(self._copy, text, elsewhere))):
            raise ValueError(f"{self._folder} has later checkpoints than step {step}, of another run: {older[-1:]}")
        self._free_copy()

    def _saved(self, state: Any) -> dict[str, jax.Array]:
        return {path: leaf for path, leaf in trees.flatten(state).items() if path not in self._constant}

    def _free_copy(self) -> None:
        if jax.default_backend() != "cpu":  # where fresh memory is slow
            self._copy = {}

    def should_preserve(self, checkpoints: list, *, context: Any) -> list[bool]:
        """For orbax, which deletes the others once the newest is committed."""
        newest = sorted(info.step for info in checkpoints)[-2:]
        return [info.step in newest or info.step in self._keep for info in checkpoints]

    @wall.timed("checkpoints")
    def wait(self) -> None:
        """Waits for the save in flight; raises its error."""
        self._manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON data of a checkpoint; raises ValueError where it cannot be read."""
        index = self._index(step)
        return {**index.meta, "hashes": {path: entry["sha256"] for path, entry in index.leaves.items()}}

    def _index(self, step: int) -> leaves.Index:
        name = f"checkpoint {self._folder / str(step)}"
        try:
            index = leaves.read_index(self._folder / str(step) / "state")
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} cannot be read: {type(error).__name__}: {error}") from error
        if index.meta.get("step") != step:
            raise ValueError(f"{name} is damaged: its meta data are not those of step {step}")
        return index

    @wall.timed("checkpoints")
    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, with the structure, shapes and placement of `like`, and its constant leaves.

        Raises ValueError unless every leaf has the hash that it was saved with, OtherValues for a constant one.
        """
        name, index = f"checkpoint {self._folder / str(step)}", self._index(step)
        flat = trees.flatten(like)
        expected = {path: "{dtype}{shape}".format(**_form(leaf)) for path, leaf in flat.items()}
        found = {path: f"{entry['dtype']}{entry['shape']}" for path, entry in index.leaves.items()}
        if changed := messages.difference(found, expected, limit=3):
            raise ValueError(f"{name} has other leaves than this run (saved -> expected):\n" + "\n".join(changed))
        saved = {path: entry["sha256"] for path, entry in index.leaves.items() if entry["offset"] is None}
        if changed := messages.difference(saved, trees.leaf_hashes({path: flat[path] for path in saved}), limit=3):
            wrong = f"{name} leaves out what never trains, which has other values in this run (sha256, saved -> now):"
            hint = "Likely another weight file, or another version of what reads it; resume with those of then"
            raise OtherValues("\n".join([wrong, *changed, f"{hint}, or choose another workdir"]))
        try:
            arrays = leaves.read(self._folder / str(step) / "state", index)
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is damaged, {error}") from error

        def put(array: np.ndarray, leaf: jax.Array) -> jax.Array:
            if leaf.is_fully_addressable:
                return jax.device_put(array, leaf.sharding, may_alias=False)  # a step may then reuse the memory
            return jax.make_array_from_callback(array.shape, leaf.sharding, lambda index: array[index])

        restored = [put(arrays[path], leaf) if path in arrays else leaf for path, leaf in flat.items()]
        return jax.tree.unflatten(jax.tree.structure(like), restored)

    @wall.timed("checkpoints")
    def restore_latest(self, like: Callable[[int], Any]) -> Restored | None:
        """The newest intact checkpoint, or None where the run has none yet; like(step) has the structure of its state.

        Deletes the newer ones. Raises ValueError where there are checkpoints and none is intact; and OtherValues.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, like(step))
            except OtherValues:
                raise
            except ValueError as error:
                damaged[step] = str(error)
                continue
            for newer in damaged:
                self._manager.delete(newer)
            return Restored(step, state, self.meta(step), [*damaged.values()])
        if damaged:
            hint = f"no checkpoint in {self._folder} is intact; move the folder away to start over:"
            raise ValueError("\n".join([hint, *damaged.values()]))
        return None


def _copy_of(state: dict[str, jax.Array], old: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A copy of one replica of a state, `{path: leaf}`, in the memory of the copy `old`; does not wait for it.

    Where the device has no room for it, the copy is in the host's memory, and waited for.
    """
    flat = {path: _one_replica(leaf) for path, leaf in state.items()}
    forms = [{path: _form(leaf) for path, leaf in each.items()} for each in (old, flat)]
    fits = forms[0] == forms[1] and all(isinstance(leaf, jax.Array) for leaf in old.values())
    try:
        copy, _ = _copy_into(old, flat) if fits else _copy_fresh(flat)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {path: np.array(leaf) for path, leaf in flat.items()}
    return copy


def _one_replica(leaf: jax.Array) -> jax.Array:
    if not leaf.is_fully_replicated:  # cut over devices: every one gets the whole, all processes take part
        leaf = jax.device_put(leaf, jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec()))
    return leaf.addressable_data(0)


def _copies(flat: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    # XLA runs cheap programs on the calling thread; it counts a gigabyte of copies as cheap, but not a matrix product.
    number = next(iter(flat.values())).reshape(-1)[0]
    work = jnp.full((64, 64), number.astype(jnp.float32))
    return jax.tree.map(jnp.copy, flat), work @ work


_copy_fresh = jax.jit(_copies)
_copy_into = jax.jit(lambda old, flat: _copies(flat), donate_argnums=0, keep_unused=True)


class _Handler(ocp.AsyncCheckpointHandler):
    """How orbax writes a state: on threads of low priority."""

    async def async_save(self, directory: Any, args: "_Save") -> list[Any]:
        async def write() -> None:
            if sys.platform == "linux":  # there the priority is each thread's own, and inherited by those it starts
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            # Views of the host's memory, which the copy itself must not keep: the next save writes over it.
            hosts = (x.addressable_data(0) if isinstance(x, jax.Array) else x for x in args.leaves.values())
            arrays = dict(zip(args.leaves, map(np.asarray, hosts), strict=True))
            leaves.write(pathlib.Path(directory), arrays, args.meta, args.elsewhere)

        if jax.process_index():
            return []
        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="checkpoint")]

    def save(self, directory: Any, args: Any = None) -> None:
        raise NotImplementedError("Checkpoints saves in the background, and restores without orbax")

    restore = save


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Save(ocp.args.CheckpointArgs):
    leaves: Mapping[str, jax.Array]
    meta: str
    elsewhere: Mapping[str, Mapping[str, Any]]


def _form(leaf: jax.Array) -> dict[str, Any]:
    return {"dtype": leaf.dtype.name, "shape": list(leaf.shape)}
