# SPDX-License-Identifier: Apache-2.0
"""Training on many devices and in several processes: how processes meet, and where state, weights and batches live.

    gm.train.initialize_distributed()                  # nothing to do where the environment names one process
    placement = Placement(gm.sharding.FSDPSharding())  # any strategy of gm.sharding, over the devices of all processes
    frozen = placement.put(frozen)
    shardings = placement.state(jax.eval_shape(...))   # for `make_step(shardings=...)`, and to put or restore a state
    for batch in placement.batches(loader): ...        # each process brings its rows: Loader(shard=placement.shard)

What a strategy cuts is `gm/sharding`'s; the computation follows from where the arrays are. Values that processes tell each
other are `_processes.py`'s, saving is `_checkpoints.py`'s.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gemma.errors import DataError, TrainingError
from gemma.gm.ckpts._load import insert
from gemma.gm.ckpts._orbax import flatten
from gemma.gm.nn._packed import Packed
from gemma.gm.sharding import ReplicatedSharding, ShardingStrategy, replicated, split_batch
from gemma.gm.train._checkpoints_state import named
from gemma.gm.train._processes import gather_objects, process
from gemma.gm.train._rendezvous import meet

_ENVIRONMENT = dict(coordinator="JAX_COORDINATOR_ADDRESS", processes="JAX_NUM_PROCESSES", index="JAX_PROCESS_ID")


def initialize_distributed(
    coordinator: str | None = None, processes: int | None = None, index: int | None = None, *, timeout_s: int = 300
) -> tuple[int, int]:
    """Joins the other processes of the run; to be called before anything else asks JAX for a device.

    Args:
      coordinator: "host:port" of process 0, a free port of a network that is trusted: whoever reaches it can join. None:
        $JAX_COORDINATOR_ADDRESS; without that nothing is done, and this is the only process. "auto": where a cluster's
        manager (Slurm, Open MPI, Kubernetes, TPU pods) says who is who.
      processes: how many; None: $JAX_NUM_PROCESSES.
      index: of this one, from 0; None: $JAX_PROCESS_ID.
      timeout_s: seconds to wait for the others.

    Returns:
      (index, count) of this process; (0, 1) alone.

    Raises:
      TrainingError: half of the settings is missing, a process does not come, or JAX was used already.
    """
    if jax.distributed.is_initialized():
        return process()
    given = dict(coordinator=coordinator, processes=processes, index=index)
    given = {name: os.environ.get(_ENVIRONMENT[name]) if value is None else value for name, value in given.items()}
    if all(value in (None, "") for value in given.values()):
        return 0, 1
    try:
        arguments = {} if given["coordinator"] == "auto" else _arguments(given, timeout_s)
        jax.distributed.initialize(**arguments, initialization_timeout=timeout_s)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        reason = str(error).splitlines()[0][:300]
        raise TrainingError(
            f"the processes of this run did not meet: {reason}. Expected {given['processes']} of them within {timeout_s} s; "
            f"start all with the same address ({given['coordinator']}) and number, each with an index of its own, before "
            f"anything else uses JAX"
        ) from error
    return process()


def _arguments(given: Mapping[str, Any], timeout_s: int) -> dict[str, Any]:
    """What JAX is told, once all processes are there."""
    missing = [f"{name} (or ${_ENVIRONMENT[name]})" for name, value in given.items() if value in (None, "")]
    if missing:
        raise TrainingError(
            f"several processes: expected coordinator, processes and index; missing: {', '.join(missing)}"
        )
    try:
        count, index = int(given["processes"]), int(given["index"])
    except ValueError:
        count, index = 0, 0
    host, _, port = str(given["coordinator"]).rpartition(":")
    if not 0 <= index < count or not host or not port.isdigit():
        raise TrainingError(
            f"several processes: expected host:port, and an index below the number of processes; got "
            f"{given['coordinator']!r}, index {given['index']!r} of {given['processes']!r}"
        )
    address, own = meet(host.strip("[]"), int(port), count, index, timeout_s)
    bind = dict(coordinator_bind_address=f"{address}:{port}") if own else {}
    # Numeric, and only there: JAX would look the name up in its own way, and listen on every network of the machine.
    return dict(coordinator_address=f"{address}:{port}", num_processes=count, process_id=index) | bind


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a run live, by a strategy of `gm.sharding`.

    Attributes:
      strategy: for the parameters; its mesh covers the devices of all processes. None: all devices, each with everything
        and its part of the rows.
    """

    strategy: ShardingStrategy = dataclasses.field(default_factory=ReplicatedSharding)

    @property
    def mesh(self) -> Mesh:
        """That of the strategy."""
        return self.strategy({"x": jax.ShapeDtypeStruct((1,), "float32")})["x"].mesh

    @property
    def shard(self) -> tuple[int, int]:
        """(index, count) for the loader of this process."""
        return process()

    def params(self, tree: Any) -> Any:
        """Shardings of a tree of parameters, or of a part of it. A packed weight is copied to every device."""
        leaves, shapes = flatten(tree), {}
        for name, leaf in leaves.items():
            insert(shapes, name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        found, placed = flatten(self.strategy(shapes)), {}
        whole = replicated(self.mesh)
        for name, leaf in leaves.items():
            where = jax.tree.map(lambda _: whole, leaf) if isinstance(leaf, Packed) else found[name]
            insert(placed, name, where)
        return placed

    def state(self, state: Any) -> Any:
        """Shardings of a `State`, or of its shapes: what belongs to a parameter lives where the parameter does.

        That is every leaf whose name ends in a parameter's and that has its shape: its moments in the optimizer, its
        moving average. Everything else is copied to all devices.
        """
        params = {name: leaf.shape for name, leaf in named(state.params).items()}
        where, whole = flatten(self.params(state.params)), replicated(self.mesh)

        def sharding(name: str, leaf: Any) -> NamedSharding:
            parts = name.split("/")
            for start in range(len(parts)):  # the longest ending first
                ending = "/".join(parts[start:])
                if params.get(ending) == leaf.shape:
                    return where[ending]
            return whole

        placed = [sharding(name, leaf) for name, leaf in named(state).items()]
        return jax.tree.unflatten(jax.tree.structure(state), placed)

    def put(self, tree: Any, shardings: Any = None) -> Any:
        """A tree on its devices, leaf by leaf.

        Args:
          tree: arrays; every process has all of it, or it is spread over them already.
          shardings: a tree of them like `tree`; None: those of `params`.
        """
        return jax.tree.map(_put, tree, self.params(tree) if shardings is None else shardings)

    def batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The rows of all processes as one batch, spread over the copies of the model.

        Args:
          batch: the rows of this process. Other axes may differ between processes (lengths of buckets): all are filled up
            with zeros to the longest.

        Returns:
          The same names; rows in the order of the processes. Rows that cannot be divided among the devices are computed
          by each of them, which changes nothing but the time.

        Raises:
          DataError: processes bring different fields or numbers of rows, or rows that cannot be divided among them.
        """
        mesh, batch = self.mesh, {name: np.asarray(value) for name, value in batch.items()}
        count = process()[1]
        batch = _agreed(batch) if count > 1 else batch
        split, parts = split_batch(mesh), mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
        placed = {}
        for name, value in batch.items():
            rows = value.shape[0] * count if value.ndim else 0
            if rows and rows % parts == 0:
                placed[name] = _global_rows(value, split, rows)
            elif count == 1:
                placed[name] = jax.device_put(value, replicated(mesh))
            else:
                raise DataError(
                    f"{name}: {rows} rows of {count} processes cannot be divided among {parts} copies of the model; "
                    f"choose a batch size that is a multiple of {max(1, parts // count)}"
                )
        return placed

    def batches(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[dict[str, jax.Array]]:
        """`batch` of each; ends as soon as one process has none left, so that no process waits for another."""
        own = iter(batches)
        while True:
            batch = next(own, None)
            if not all(gather_objects(batch is not None)):
                return
            assert batch is not None  # the line above
            yield self.batch(batch)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _global_rows(value: np.ndarray, split: NamedSharding, rows: int) -> jax.Array:
    """The rows of this process as its part of the whole."""
    index, count = process()
    if count == 1:
        return jax.device_put(value, split)
    shape, first = (rows, *value.shape[1:]), index * value.shape[0]
    own = split.addressable_devices_indices_map(shape).values()
    spans = [cut[0].indices(rows)[:2] for cut in own]
    if min(start for start, _ in spans) < first or max(stop for _, stop in spans) > first + value.shape[0]:
        # A copy of the model that several processes share needs the rows of all of them.
        from jax.experimental import multihost_utils

        every = np.asarray(multihost_utils.process_allgather(value)).reshape(shape)
        return jax.make_array_from_callback(shape, split, lambda cut: every[cut])
    return jax.make_array_from_process_local_data(split, value, shape)


def _agreed(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch of this process, filled up to the longest axes of all processes."""
    shapes = gather_objects({name: list(value.shape) for name, value in batch.items()})
    kinds = [sorted((name, len(shape), *shape[:1]) for name, shape in one.items()) for one in shapes]
    if any(kind != kinds[0] for kind in kinds):
        raise DataError(
            f"processes bring batches of different fields or numbers of rows: {shapes!r:.500}; give all of them the same "
            f"files and settings"
        )
    filled = {}
    for name, value in sorted(batch.items()):
        longest = np.max([one[name] for one in shapes], axis=0) if value.ndim else ()
        filled[name] = np.pad(value, [(0, int(most) - size) for most, size in zip(longest, value.shape)])
    return filled
