"""Parallelism is placement: the same pure steps under `jax.jit` on a mesh, or under `jax.pmap`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tl_jax.runtime import roofline

AXIS = "data"
MODES = ("jit", "pmap")
# XLA on CPU drops barriers before it fuses and orders operations: those of jax.checkpoint, without which recomputing
# saves no memory, and those of models/kernels/convolve.py.
OPTIONS = {"cpu": {"xla_disable_hlo_passes": "cse_barrier_expander"}}


class Parallel(NamedTuple):
    """How steps run on a set of devices."""

    mode: str  # "jit" (one program over a mesh) or "pmap" (one program per device, combined over AXIS)
    mesh: Mesh  # the devices, one axis of data parallelism
    fsdp: int = 0  # arrays of a state with at least this many elements are divided over the devices; 0: none

    @property
    def axis_name(self) -> str | None:
        """What the steps and BatchNorm need to combine over: AXIS under pmap, nothing under jit."""
        return AXIS if self.mode == "pmap" else None

    def shardings(self, tree: Any) -> Any:
        """Where each leaf of a state or of variables belongs; takes arrays or their shapes.

        `fsdp` cuts the largest axis that the devices divide, among equals the first; without one a leaf stays whole.
        """

        def sharding(leaf):
            axes = [axis for axis, size in enumerate(leaf.shape) if size and size % self.mesh.size == 0]
            if not self.fsdp or leaf.size < self.fsdp or not axes:
                return self._whole
            axis = max(axes, key=lambda axis: leaf.shape[axis])
            return NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, AXIS))

        return jax.tree.map(sharding, tree)

    def place(self, tree: Any) -> Any:
        """Puts a state or variables on the devices, by `shardings`."""
        return jax.device_put(tree, self.shardings(tree))

    def whole(self, variables: Any) -> Any:
        """Inside a step: the variables whole on every device; their gradients are divided again.

        A leaf is collected for the forward and again for the backward pass (Rajbhandari et al. 2020, 5.3, stage 3).
        """
        if not self.fsdp:
            return variables

        def collect(leaf, sharding):
            collected = jax.checkpoint(_collect, static_argnums=(1, 2))
            return leaf if sharding == self._whole else collected(leaf, self._whole, sharding)

        return jax.tree.map(collect, variables, self.shardings(variables))

    @property
    def _whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def _options(self) -> dict[str, str] | None:
        return OPTIONS.get(self.mesh.devices.flat[0].platform)

    def round_up(self, batch_size: int) -> int:
        """The smallest multiple of the device count that is at least `batch_size`."""
        return -(-batch_size // self.mesh.size) * self.mesh.size

    def put_batch(self, batch: Any) -> Any:
        """This process's rows of a global batch to its devices; the leading axis is cut over all devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)

    def gather(self, batch: Any) -> Any:
        """The global batch, whole on every process: the inverse of `put_batch`."""
        return jax.device_put(batch, self._whole)

    def train(self, train_step: Callable) -> Callable:
        """(state, batch) -> state on all devices. Under jit the old state's buffers are reused: do not touch it."""
        if self.mode == "jit":

            @functools.wraps(train_step)
            def placed(state, batch):
                state = train_step(state, batch)
                return jax.lax.with_sharding_constraint(state, self.shardings(state))

            return jax.jit(placed, donate_argnums=0)
        mapped = jax.pmap(train_step, AXIS, in_axes=(None, 0), out_axes=None, devices=list(self.mesh.devices.flat))
        return lambda state, batch: mapped(state, self._per_device(batch))

    def compile(self, train_step: Callable, state: Any, batch: Any) -> tuple[Callable, dict[str, Any]]:
        """`train` compiled for a state and a batch, and what a step `cost`s; under pmap all of that is None."""
        step = self.train(train_step)
        if self.mode == "pmap":
            return step, dict.fromkeys(("flops_per_step", "bytes_per_step", "memory_bytes"))
        traced = step.trace(state, batch)
        compiled = traced.lower().compile(compiler_options=self._options)
        return compiled, self.cost(compiled, traced.jaxpr)

    def cost(self, compiled: Any, jaxpr: Any) -> dict[str, Any]:
        """What XLA says of a compiled step, made from `jaxpr`; None where the backend does not say.

        flops_per_step, bytes_per_step: of all devices; XLA counts those of one, and the body of a loop once, which the
        loops of jaxpr correct. On a GPU, XLA counts calls of cuDNN and cuBLAS as nothing: FLOPs come from jaxpr, and
        the bytes of these calls from their arguments. memory_bytes: arguments, results and temporaries of one device.
        """
        counted, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
        work, once = roofline.work(jaxpr), roofline.work(jaxpr, looped=False)
        flops, moved, times = counted.get("flops"), counted.get("bytes accessed"), work / once if once else 1.0
        flops = flops and self.mesh.size * flops * times
        if self.mesh.devices.flat[0].platform == "gpu":
            flops, moved = work, moved and moved + roofline.called_bytes(compiled.as_text())
        sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        memory_bytes = memory and sum(getattr(memory, size) for size in sizes) - memory.alias_size_in_bytes
        moved = moved and self.mesh.size * moved * times
        return {"flops_per_step": flops, "bytes_per_step": moved, "memory_bytes": memory_bytes}

    def evaluate(self, eval_step: Callable) -> Callable:
        """(variables, images) -> per-example outputs in the order of the images, whole on every process."""
        if self.mode == "jit":

            @functools.wraps(eval_step)  # the name of the compiled program
            def collected(variables, x):
                return eval_step(self.whole(variables), x)

            return jax.jit(collected, out_shardings=self._whole, compiler_options=self._options)
        mapped = jax.pmap(eval_step, AXIS, in_axes=(None, 0), devices=list(self.mesh.devices.flat))

        def evaluate(variables, images):
            outputs = mapped(variables, self._per_device(images))
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)

        return evaluate

    def _per_device(self, batch: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(self.mesh.size, -1, *x.shape[1:]), batch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _collect(leaf: jax.Array, whole: NamedSharding, divided: NamedSharding) -> jax.Array:
    """A divided leaf, whole on every device; its gradient is summed over the devices and divided as the leaf is."""
    return jax.lax.with_sharding_constraint(leaf, whole)


_collect.defvjp(
    lambda leaf, whole, divided: (_collect(leaf, whole, divided), None),
    lambda whole, divided, _, gradient: (jax.lax.with_sharding_constraint(gradient, divided),),
)


def make_parallel(mode: str = "jit", devices: Sequence[jax.Device] | None = None, fsdp: int = 0) -> Parallel:
    """Data parallelism over `devices` (default: all of them), with one of MODES; fsdp: see Parallel."""
    if mode not in MODES:
        raise ValueError(f"unknown parallel mode {mode!r}; known: {', '.join(MODES)}")
    if mode == "pmap" and jax.process_count() > 1:
        raise ValueError("parallel mode 'pmap' runs in one process only; several processes need parallel='jit'")
    if mode == "pmap" and fsdp:
        raise ValueError(f"fsdp={fsdp} needs a mesh, and parallel mode 'pmap' has none; set parallel='jit' or fsdp=0")
    devices = list(jax.devices() if devices is None else devices)
    # Axes must be Auto: Explicit ones put shardings into the types, which Linen modules do not expect.
    return Parallel(mode, Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,)), fsdp)


def check_batch_size(batch_size: int, accumulate: int, device_count: int) -> None:
    """Raises ValueError unless every device gets the same number of examples in every part of a step."""
    if batch_size % (multiple := device_count * accumulate):
        pieces = f"{device_count} device(s) x accumulate={accumulate}"
        raise ValueError(f"batch_size={batch_size} does not divide into {pieces}; use a multiple of {multiple}")
