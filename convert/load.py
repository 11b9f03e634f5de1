"""Checkpoints in memory: folders of either kind -> the model's parameters, and parameters -> a folder of ours."""

import contextlib
import os
import shutil
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from convert.boxes import Bounds, box_shape, box_size, intersection, resolved, slices, whole
from convert.checkpoint import open_checkpoint
from convert.chunks import Source
from convert.conversion import parse_size
from convert.destination import check_apart, work_folder
from convert.dtypes import FLOAT32, cast, count_nonfinite, weight_dtype
from convert.files import expanded, listing, shown
from convert.folder import carried_files, check_vocabulary, config_bytes, local_folder
from convert.names import Shape, arrays_of
from convert.native import NativeSink
from convert.shares import Deal, Dealer, is_shared, placed, stack
from convert.workspace import open_workspace
from qwen2_jax.config import Qwen2Config
from sharding.rules import param_shardings

Params = dict[str, Any]

_THREADS = 4  # reading and hashing release the interpreter's lock; more threads than cores hide waiting for the disk
_ALIGNMENT = 64  # bytes; JAX on CPU takes over memory that is aligned so, and copies any other


def load_checkpoint(
    path: str | os.PathLike[str],
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    stacked: bool = False,
    max_host_memory: int | str = "8GiB",
) -> tuple[Qwen2Config, Params]:
    """Reads a model from a Hugging Face folder, a hub id, or a checkpoint folder of ours.

    Args:
      path: the folder or id.
      dtype: of the parameters: bfloat16, float16 or float32. None keeps each one's. Numbers too large for it become
        infinite, with a warning that names their arrays.
      mesh: devices to spread the parameters over, by `sharding.rules.param_shardings`. Each process reads what its own
        devices hold; where whole chunks of that would be more than a tenth too much, the processes read different
        chunks and exchange them. All of them must call this. None puts everything on the default device.
      stacked: the form of the parameter tree: per layer (`layers_0`, ...), or with a leading axis over layers.
      max_host_memory: of arrays on their way to devices, as bytes or as text such as "512MB". One array's part for this
        process is always held whole, and each of four threads takes some 100 MB besides. On CPU devices the parameters
        themselves take what they take.

    Returns:
      The configuration, and the parameters as nested dicts of jax.Arrays. Their memory is theirs: files may change or
      go away afterwards.

    Raises:
      ValueError: for bad input: see `HuggingFaceSource` and `NativeSource`. In a folder of ours every number is checked
        against its digest before it is used.
      OSError: if a file cannot be read.
    """
    return load_open(open_checkpoint(path), dtype, mesh, stacked, max_host_memory)


def load_open(
    source: Source,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    stacked: bool = False,
    max_host_memory: int | str = "8GiB",
) -> tuple[Qwen2Config, Params]:
    """`load_checkpoint` of a checkpoint that is open already."""
    config = source.config
    room = _Room(parse_size(max_host_memory))
    target = None if dtype is None else weight_dtype(dtype)
    leaves = _leaves(config, source.arrays, stacked)
    # Large ones first: the last thread to finish then has little left to do.
    order = sorted(leaves, key=lambda leaf: -source.arrays[leaves[leaf][0]].size)
    shardings = None if mesh is None else _flatten(param_shardings(config, mesh, stacked))
    shared = {} if shardings is None else shared_arrays(source, {leaf: leaves[leaf] for leaf in order}, shardings)
    overflowed: Counter[str] = Counter()  # each array is read by one thread

    def dtype_of(leaf: str) -> np.dtype:
        stored = {source.dtypes[path] for path in leaves[leaf]}
        return target or (stored.pop() if len(stored) == 1 else FLOAT32)

    def load(leaf: str) -> jax.Array:
        paths, wanted = leaves[leaf], dtype_of(leaf)
        shape = source.arrays[paths[0]].shape
        shape = (len(paths), *shape) if leaf.startswith("layers.") else shape
        boxes = {whole(shape)} if shardings is None else _own_boxes(shardings[leaf], shape)
        with room.taken(sum(map(box_size, boxes)) * wanted.itemsize):
            parts = _read_boxes(source, paths, shape, sorted(boxes, key=repr), wanted, overflowed)
            if shardings is None:
                return jax.block_until_ready(jax.device_put(parts[whole(shape)]))
            return _on_devices(parts, shape, shardings[leaf], wanted)

    def take_in(leaf: str, path: str) -> jax.Array:
        deal, wanted = shared[path], dtype_of(leaf)
        with room.taken(sum(map(box_size, _own_boxes(deal.sharding, deal.shape))) * wanted.itemsize):
            return _on_devices(_read_slots(source, path, deal, wanted, overflowed), deal.shape, deal.sharding, wanted)

    def place(leaf: str, taken: Iterator[jax.Array]) -> jax.Array:
        assert shardings is not None
        paths, sharding = leaves[leaf], shardings[leaf]
        one = _of_one(leaf, sharding)
        arrays = [
            placed(shared[path], next(taken), source.chunks(path), source.arrays[path].shape, one) for path in paths
        ]
        return arrays[0] if one is sharding else stack(arrays, sharding)

    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [(leaf, path) for leaf in order for path in (leaves[leaf] if leaves[leaf][0] in shared else [None])]
        # Chunks wait on the devices for the exchange, each in a slot of its own: not too many of them.
        ahead = 2 * _THREADS if shared else len(jobs)
        read = _in_order(pool, lambda job: load(job[0]) if job[1] is None else take_in(*job), jobs, ahead)
        # What moves between processes does so in the same order on all of them: here, and not in the threads.
        arrays = {leaf: place(leaf, read) if leaves[leaf][0] in shared else next(read) for leaf in order}
    if overflowed:
        counts = [f"{name}: {count}" for name, count in overflowed.items()]
        warnings.warn(
            f"{overflowed.total()} weights are too large for {target}, now infinite: {listing({'arrays': counts})}",
            stacklevel=3,
        )
    return config, _nest({leaf: arrays[leaf] for leaf in leaves})


def shared_arrays(
    source: Source, leaves: Mapping[str, list[str]], shardings: Mapping[str, NamedSharding]
) -> dict[str, Deal]:
    """By path, the arrays whose chunks are dealt out to processes, since each would read too much for its own parts."""
    mesh = next(iter(shardings.values())).mesh
    assert isinstance(mesh, jax.sharding.Mesh)
    dealer, shared = Dealer(mesh), {}
    known: dict[Any, bool] = {}  # layers are alike
    for leaf, paths in leaves.items():
        one, shape, chunks = _of_one(leaf, shardings[leaf]), source.arrays[paths[0]].shape, source.chunks(paths[0])
        alike = one, shape, len(chunks)
        if alike not in known:
            known[alike] = is_shared(one, shape, chunks)
        if known[alike]:
            shared.update({path: dealer.deal(source.chunks(path), source.dtypes[path].itemsize) for path in paths})
    return shared


def _in_order(pool: Executor, run: Callable[[Any], jax.Array], jobs: Iterable[Any], ahead: int) -> Iterator[jax.Array]:
    """The results of run(job), of which at most `ahead` are begun before they are asked for."""
    begun: deque[Future[jax.Array]] = deque()
    try:
        for job in jobs:
            begun.append(pool.submit(run, job))
            if len(begun) > ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()


def _of_one(leaf: str, sharding: NamedSharding) -> NamedSharding:
    """How one layer's array of a leaf is spread, where the leaf is the stack of all layers'."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])) if leaf.startswith("layers.") else sharding


def _on_devices(
    parts: Mapping[Bounds, np.ndarray], shape: Shape, sharding: NamedSharding, dtype: np.dtype
) -> jax.Array:
    def part(index: Any) -> np.ndarray:
        return parts[resolved(index, shape)]

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part, dtype=dtype))


def save_checkpoint(
    path: str | os.PathLike[str],
    config: Qwen2Config,
    params: Mapping[str, Any],
    tokenizer_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder of ours; it appears only when it is complete.

    Args:
      path: the folder to make.
      config: the model.
      params: its parameters in either form, nested dicts of arrays (numpy or jax) that this process can address;
        bfloat16, float16 or float32, each written as it is.
      tokenizer_from: a checkpoint folder or hub id whose tokenizer and generation files are carried along. Without it,
        the command line cannot use the result.
      overwrite: whether a checkpoint at `path` may be replaced.

    Raises:
      ValueError: if the parameters are not those of `config` (all differences are listed), if `tokenizer_from` holds no
        tokenizer or one with ids that they have no row for, or if `path` is taken.
      OSError: if it cannot be written.
    """
    destination = Path(os.path.realpath(expanded(path)))
    arrays = arrays_of(config)
    rows = _rows(config, params)
    wrong = [f"{p}: missing" for p in arrays if p not in rows] + [f"{p}: unknown" for p in rows if p not in arrays]
    wrong += [
        f"{p}: shape {rows[p][1]}, expected {array.shape}"
        for p, array in arrays.items()
        if p in rows and rows[p][1] != array.shape
    ]
    wrong += [
        f"{p}: not addressable by this process"
        for p, (leaf, _, _) in rows.items()
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"the parameters are not those of the configuration: {'; '.join(wrong[:8])}{more}")
    dtypes = {p: weight_dtype(rows[p][0].dtype) for p in arrays}
    carried = [] if tokenizer_from is None else _tokenizer_files(local_folder(tokenizer_from, "none"), config)
    check_apart(work_folder(destination), carried)

    with open_workspace(destination, {"job": "save", "process": os.getpid()}, overwrite) as work:
        sink = NativeSink(work.folder, arrays, dtypes)

        def save(array_path: str) -> list[str]:
            leaf, _, row = rows[array_path]
            flat = np.ascontiguousarray(leaf if row is None else leaf[row]).reshape(-1)
            digests = []
            for chunk in sink.chunks(array_path):
                numbers = flat[chunk.start : chunk.stop]
                sink.write(array_path, chunk, numbers)
                digests.append(sink.digest(array_path, chunk, numbers))
            return digests

        with ThreadPoolExecutor(_THREADS) as pool:
            digests = dict(zip(arrays, pool.map(save, arrays), strict=True))
        for file in carried:
            shutil.copyfile(file, work.folder / file.name)
        (work.folder / "config.json").write_bytes(config_bytes(config, dtypes["embed.embedding"]))
        sink.finish(digests)
        work.publish()


def _tokenizer_files(folder: Path, config: Qwen2Config) -> list[Path]:
    carried = carried_files(folder)
    names = {path.name for path in carried}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise ValueError(
            f"tokenizer_from: {shown(folder)} holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt"
        )
    check_vocabulary(folder, config)
    return carried


def _leaves(config: Qwen2Config, paths: Mapping[str, Any], stacked: bool) -> dict[str, list[str]]:
    """The arrays that make up each leaf of the wanted tree: one, or one per layer of its kind, in order."""
    leaves: dict[str, list[str]] = {}
    for path in paths:
        first, _, rest = path.partition(".")
        if stacked and first.startswith("layers_"):
            block = int(first.removeprefix("layers_")) % config.layer_period
            leaves.setdefault(f"layers.block_{block}.{rest}", []).append(path)
        else:
            leaves[path] = [path]
    return leaves


def _rows(config: Qwen2Config, params: Mapping[str, Any]) -> dict[str, tuple[Any, Shape, int | None]]:
    """For each per-layer path: the leaf that holds it, its shape, and its row if the leaf is stacked."""
    rows: dict[str, tuple[Any, Shape, int | None]] = {}
    for path, leaf in _flatten(params).items():
        if not path.startswith("layers.block_"):
            rows[path] = (leaf, tuple(leaf.shape), None)
            continue
        block, _, rest = path.removeprefix("layers.block_").partition(".")
        for row in range(leaf.shape[0]):
            layer = row * config.layer_period + int(block)
            rows[f"layers_{layer}.{rest}"] = (leaf, tuple(leaf.shape[1:]), row)
    return rows


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, child in tree.items():
        flat.update(_flatten(child, f"{prefix}{key}.") if isinstance(child, Mapping) else {prefix + key: child})
    return flat


def _nest(flat: Mapping[str, Any]) -> Params:
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _own_boxes(sharding: jax.sharding.Sharding, shape: Shape) -> set[Bounds]:
    """What the devices of this process hold; devices with the same numbers share a box."""
    return {resolved(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}


def _read_boxes(
    source: Source, paths: list[str], shape: Shape, boxes: list[Bounds], dtype: np.dtype, overflowed: Counter[str]
) -> dict[Bounds, np.ndarray]:
    """The numbers of a leaf of `shape` in each box, cast to `dtype`, in memory of their own, aligned for JAX.

    Every chunk of the source that some box needs is read once. A leaf with one more axis than its arrays is the stack
    of those at `paths`. Finite numbers that the cast made infinite are counted in `overflowed`, by array.
    """
    outs = {box: _aligned_empty(box_shape(box), dtype) for box in boxes}
    if len(shape) == len(source.arrays[paths[0]].shape):
        _read_array(source, paths[0], outs, overflowed)
        return outs
    for layer, path in enumerate(paths):
        inside = {box: out[layer - box[0][0]] for box, out in outs.items() if box[0][0] <= layer < box[0][1]}
        if inside:
            _read_array(source, path, {box[1:]: out for box, out in inside.items()}, overflowed)
    return outs


def _read_array(source: Source, path: str, outs: Mapping[Bounds, np.ndarray], overflowed: Counter[str]) -> None:
    """Fills each array of `outs` with the box of array `path` that it is for."""
    stored = source.dtypes[path]
    for chunk in source.chunks(path):
        meets = {box: inside for box in outs if (inside := intersection(box, chunk.bounds))}
        if not meets:
            continue
        if len(meets) == 1:
            ((box, inside),) = meets.items()
            target = outs[box][slices(inside, box)]
            if inside == chunk.bounds and target.flags.c_contiguous and stored == target.dtype:
                source.read(path, chunk.start, target.reshape(-1))
                continue
        numbers = np.empty(chunk.size, stored)
        source.read(path, chunk.start, numbers)
        numbers = numbers.reshape(chunk.shape)
        for box, inside in meets.items():
            part = np.ascontiguousarray(numbers[slices(inside, chunk.bounds)])
            outs[box][slices(inside, box)] = _cast(part, outs[box].dtype, path, overflowed)


def _read_slots(
    source: Source, path: str, deal: Deal, dtype: np.dtype, overflowed: Counter[str]
) -> dict[Bounds, np.ndarray]:
    """What the devices of this process take in of an array that is dealt out; nobody looks into empty slots."""
    blocks = {box: _aligned_empty(box_shape(box), dtype) for box in _own_boxes(deal.sharding, deal.shape)}
    for slot, chunk in zip(deal.slots, source.chunks(path), strict=True):
        for box, block in blocks.items():
            if box[0][0] <= slot < box[0][1]:
                numbers = np.empty(chunk.size, source.dtypes[path])
                source.read(path, chunk.start, numbers)
                block[slot - box[0][0], : chunk.size] = _cast(numbers, dtype, path, overflowed)
    return blocks


def _cast(numbers: np.ndarray, dtype: np.dtype, path: str, overflowed: Counter[str]) -> np.ndarray:
    result = cast(numbers, dtype)
    if numbers.dtype != dtype and (infinite := count_nonfinite(result.reshape(-1))):
        infinite -= count_nonfinite(numbers.reshape(-1))
        overflowed.update({path: infinite} if infinite else {})
    return result


class _Room:
    """Memory that threads share: each waits for its part, and one that is larger than all waits to be alone."""

    def __init__(self, size: int):
        self._size, self._used = size, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + size <= self._size)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def _aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % _ALIGNMENT
    return memory[skip : skip + size].view(dtype).reshape(shape)
