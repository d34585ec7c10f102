"""Parallelism is placement: the same pure steps under `jax.jit` on a mesh, or under `jax.pmap`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"
MODES = ("jit", "pmap")


class Parallel(NamedTuple):
    """How steps run on a set of devices.

    mode: "jit" (one program over a mesh) or "pmap" (one program per device, combined over AXIS).
    mesh: the devices, one axis of data parallelism.
    """

    mode: str
    mesh: Mesh

    @property
    def axis_name(self) -> str | None:
        """What the steps and BatchNorm need to combine over: AXIS under pmap, nothing under jit."""
        return AXIS if self.mode == "pmap" else None

    def replicate(self, tree: Any) -> Any:
        """Puts a whole tree on every device."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def round_up(self, batch_size: int) -> int:
        """The smallest multiple of the device count that is at least `batch_size`."""
        return -(-batch_size // self.mesh.size) * self.mesh.size

    def put_batch(self, batch: Any) -> Any:
        """This process's rows of a global batch to its devices; the leading axis is cut over all devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)

    def gather(self, batch: Any) -> Any:
        """The global batch, whole on every process: the inverse of `put_batch`."""
        return self.replicate(batch)

    def train(self, train_step: Callable) -> Callable:
        """(state, batch) -> state on all devices. Under jit the old state's buffers are reused: do not touch it."""
        if self.mode == "jit":
            return jax.jit(train_step, donate_argnums=0, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        mapped = jax.pmap(train_step, AXIS, in_axes=(None, 0), out_axes=None, devices=list(self.mesh.devices.flat))
        return lambda state, batch: mapped(state, self._per_device(batch))

    def compile(self, train_step: Callable, state: Any, batch: Any) -> tuple[Callable, dict[str, Any]]:
        """`train` compiled for a state and a batch, and what XLA says of a step: flops_per_step, memory_bytes.

        memory_bytes are the arguments, results and temporaries of one device. Under pmap both are None.
        """
        step = self.train(train_step)
        if self.mode == "pmap":
            return step, {"flops_per_step": None, "memory_bytes": None}
        compiled = step.lower(state, batch).compile()
        memory = compiled.memory_analysis()
        sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        return compiled, {
            "flops_per_step": (compiled.cost_analysis() or {}).get("flops"),
            "memory_bytes": sum(getattr(memory, size) for size in sizes) - memory.alias_size_in_bytes
            if memory
            else None,
        }

    def evaluate(self, eval_step: Callable) -> Callable:
        """(variables, images) -> per-example outputs in the order of the images, whole on every process."""
        if self.mode == "jit":
            return jax.jit(eval_step, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        mapped = jax.pmap(eval_step, AXIS, in_axes=(None, 0), devices=list(self.mesh.devices.flat))

        def evaluate(variables, images):
            outputs = mapped(variables, self._per_device(images))
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

        return evaluate

    def _per_device(self, batch: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(self.mesh.size, -1, *x.shape[1:]), batch)


def make_parallel(mode: str = "jit", devices: Sequence[jax.Device] | None = None) -> Parallel:
    """Data parallelism over `devices` (default: all of them), with one of MODES."""
    if mode not in MODES:
        raise ValueError(f"unknown parallel mode {mode!r}; known: {', '.join(MODES)}")
    if mode == "pmap" and jax.process_count() > 1:
        raise ValueError("parallel mode 'pmap' runs in one process only; several processes need parallel='jit'")
    devices = list(jax.devices() if devices is None else devices)
    # Axes must be Auto: Explicit ones put shardings into the types, which Linen modules do not expect.
    return Parallel(mode, Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,)))


def check_batch_size(batch_size: int, accumulate: int, device_count: int) -> None:
    """Raises ValueError unless every device gets the same number of examples in every part of a step."""
    if batch_size % (device_count * accumulate):
        raise ValueError(
            f"batch_size={batch_size} does not divide into {device_count} device(s) x accumulate={accumulate}; "
            f"use a multiple of {device_count * accumulate}"
        )
