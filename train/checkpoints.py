"""Checkpoints of a run: saved in the background while training goes on, each whole or not there, every number vouched
for by a digest that was computed where the number was.

Orbax (its v1 interface) copies the arrays off the devices, writes them, each process its own, and reads them onto any
mesh. What it leaves open is done here: it notices no flipped bit, casts to another dtype silently, and its managers
remember steps rather than look them up. See `convert.step_folder` for what is in a folder.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import queue
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from convert.chunks import CHUNK_BYTES
from convert.files import FULL, listing, sync, sync_tree
from convert.folder import carried_files
from convert.step_folder import (
    MANIFEST,
    STEP_NAME,
    Manifest,
    Stored,
    check_arrays,
    check_files,
    damaged,
    read_manifest,
    reason,
    small_files,
)
from train.digest import digests

_ABANDONED = "manifest.abandoned.json"
_PARTIAL = f".{MANIFEST}.partial"
_NEW = ".new."  # before the name of a file that takes the place of another once the manifest names it
_COMMIT_SECONDS = 3600  # a network's disk may take long over many files; JAX itself notices processes that die
_STATE = re.compile(r"state-(\d+)(\.orbax.*)?")  # the second part while Orbax writes
_LOG = logging.getLogger(__name__)
_OF_NO_USE = re.compile(r".*Skipping merge of OCDBT|TensorStore data files not found|.*run\(\) raised an exception")

# Orbax warns at every save and load that there is no OCDBT, which was not asked for, and prints what goes wrong in its
# threads with a traceback, though it is raised all the same.
logging.getLogger("absl").addFilter(lambda record: not _OF_NO_USE.match(str(record.msg)))


class Saved(NamedTuple):
    """A step that is whole on the disk."""

    step: int
    seconds: float
    """From when it was to be saved."""
    stalled: float
    """Of these, the ones that `save` took, in which nobody trained."""


class Checkpoints:
    """The checkpoints of one run, for one writer at a time. With several processes, each calls everything in the same
    order; the folder must be one that all of them see.

    Args:
      folder: RUN/checkpoints, on a disk that all processes see. Made at the first save.
      model: a folder with the config.json and the tokenizer files of the model, which go into every step.
      keep_last: how many of the newest steps are kept, at least 1.
      keep_every: steps that are multiples of it are kept for good; None keeps no others.
      wait: whether `save` returns only once the step is whole.

    Raises:
      ValueError: for numbers that make no sense, or a model folder without config.json.
      OSError: if the files of the model cannot be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: str | os.PathLike[str],
        keep_last: int = 3,
        keep_every: int | None = None,
        wait: bool = False,
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}: the newest checkpoint is never removed")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every must be at least 1 step, got {keep_every}; leave it out to keep no more")
        text = os.fspath(folder)
        self.folder = epath.Path(text if "://" in text else os.path.abspath(text))
        self._keep_last, self._keep_every, self._wait = keep_last, keep_every, wait
        self.use_model(model)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self.restored: int | None = None
        """The step that this run goes on from."""
        self._saves = 0
        self._whole: queue.SimpleQueue[Saved] = queue.SimpleQueue()

    def use_model(self, model: str | os.PathLike[str]) -> None:
        """From the next save on steps get the files of this folder, as when a phase of a run changes config.json.

        Raises:
          ValueError: for a folder without config.json.
          OSError: if the files cannot be read.
        """
        config = Path(model, "config.json")
        if not config.is_file():
            raise ValueError(f"{config} is missing; every checkpoint holds the config.json and tokenizer of its model")
        # Read now: the folder that they come from may change while the run goes on.
        self._files: dict[str, bytes] = {path.name: path.read_bytes() for path in [config, *carried_files(Path(model))]}

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Starts to save a step, and returns as soon as the devices' memory is copied and may be reused, unless `wait`.

        Waits for an earlier save that is still being written. A step that is there already is replaced once the new one
        is whole. Steps beyond this one are set aside if this run went on from one before them by `restore`.

        Args:
          step: how many batches were consumed.
          state: a pytree of jax arrays.
          extra: what `restore` gives back besides; plain JSON.

        Raises:
          OSError: if an earlier save failed, or this one cannot be begun; with `wait` also if it fails.
          ValueError: if the folder holds later steps of a run that this one does not continue.
        """
        begin = time.monotonic()
        self.wait()
        arrays, _ = _named(state)
        extra = dict(extra or {})
        assert json.loads(json.dumps(extra, allow_nan=False)) == extra, "extra must come back from JSON as it is"
        later = [other for other in self.steps() if other > step]
        if later and (self.restored is None or self.restored > step):
            raise ValueError(
                f"{self.folder} holds step {later[-1]} of an earlier run, and step {step} of this one does not "
                "continue it: resume that run, or choose another folder"
            )
        vouched = digests(arrays)
        where, files = self.place(step), self._files
        self._saves += 1
        with self._named_failure(step):
            name = f"state-{self._prepared(step)}"
            with _context(arrays):
                written = ocp.save_async(where / name, arrays)
        copied = time.monotonic() - begin
        stored = {key: Stored(str(array.dtype), tuple(array.shape), vouched[key]) for key, array in arrays.items()}

        def finish() -> None:
            with self._named_failure(step):
                written.result()
                self._agreed(lambda: self._commit(Manifest(step, name, stored, {}, extra), files, later), where, name)
            seconds = time.monotonic() - begin
            self._whole.put(Saved(step, seconds, seconds if self._wait else copied))
            # Behind the barrier: the others do not wait for it, and a step that is saved does not fail by it.
            if jax.process_index() == 0:
                self._remove_old(where, name)

        self._pending = self._thread.submit(finish)
        if self._wait:
            self.wait()

    def check(self) -> list[Saved]:
        """The steps that have become whole since the last call; never waits.

        Raises:
          OSError: if a save has failed in the background since then.
        """
        if self._pending is not None and self._pending.done():
            self.wait()
        return [self._whole.get() for _ in range(self._whole.qsize())]

    def wait(self) -> None:
        """Until what was saved is on the disk. Raises the OSError of a save that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and ends. Raises the OSError of a save that failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def steps(self) -> list[int]:
        """The steps that are there as a whole, in order; always looked up, never remembered."""
        if not self.folder.exists():
            return []
        entries = [entry for entry in self.folder.iterdir() if STEP_NAME.fullmatch(entry.name)]
        return sorted(int(entry.name) for entry in entries if (entry / MANIFEST).exists())

    def latest(self) -> int | None:
        """The last of `steps`; None if there is none."""
        return max(self.steps(), default=None)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a step back, bit by bit as it was saved.

        Args:
          step: one of `steps`.
          abstract_state: the shapes, dtypes and shardings that are wanted, of `jax.ShapeDtypeStruct`s or arrays; what
            has no sharding comes onto the default device. The mesh may be another than the one saved from.

        Returns:
          The state, and what `save` was given as extra.

        Raises:
          ValueError: if there is no such step, if its arrays are not exactly those of abstract_state (all differences
            are listed), or if anything in it is damaged, with the array and its file.
          OSError: if it cannot be read.
        """
        folder, manifest = self._opened(step)
        wanted, structure = _named(abstract_state)
        self._check_arrays(manifest, wanted)
        abstract = {
            name: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
            )
            for name, leaf in wanted.items()
        }
        with self._advised(step):
            check_files(folder, manifest)
            try:
                with _context(abstract):
                    arrays = ocp.load(folder / manifest.state, abstract)
            except Exception:  # Orbax raises that very class
                check_arrays(folder, manifest, list(wanted))  # which says what and where
                raise
            found = digests(arrays)
            if wrong := [name for name in wanted if found[name] != manifest.arrays[name].digest]:
                raise ValueError(damaged(folder, manifest, wrong))
        self.restored = step
        return jax.tree.unflatten(structure, [arrays[name] for name in wanted]), manifest.extra

    def verify(self, step: int) -> None:
        """Reads a step again from where it was written, each process a share of the arrays, in bounded memory.

        Raises:
          ValueError: if there is no such step, or if anything in it is damaged, with the array and its file.
          OSError: if it cannot be read, by this process or another.
        """
        sound = False
        try:
            folder, manifest = self._opened(step)
            with self._advised(step):
                check_files(folder, manifest)
                check_arrays(folder, manifest, sorted(manifest.arrays)[jax.process_index() :: jax.process_count()])
            sound = True
        finally:
            # Nobody reports success while another finds damage; nobody waits for one who found it.
            everywhere = sound if jax.process_count() == 1 else multihost_utils.process_allgather(np.bool_(sound)).all()
        if not everywhere:
            raise OSError(f"another process could not verify step {step}: see what it says")

    def place(self, step: int) -> epath.Path:
        """The folder of a step, whether it is there or not."""
        return self.folder / f"{step:08d}"

    def _opened(self, step: int) -> tuple[epath.Path, Manifest]:
        if step not in (steps := self.steps()):
            there = f"there are {', '.join(map(str, steps))}" if steps else "there are none"
            raise ValueError(f"{self.folder} has no step {step}: {there}")
        with self._advised(step):
            folder = self.place(step)
            manifest = read_manifest(folder)
            if manifest.step != step:
                raise ValueError(f"{folder} holds step {manifest.step}; give the folder its name back")
            _finish_replacing(folder, manifest.files)
            return folder, manifest

    @contextlib.contextmanager
    def _advised(self, step: int) -> Iterator[None]:
        """Adds to an error about a damaged step which one to go on from."""
        try:
            yield
        except ValueError as error:
            before = max((other for other in self.steps() if other < step), default=None)
            advice = (
                "there is no step before it" if before is None else f"resume from the step before: --resume {before}"
            )
            raise ValueError(f"step {step}: {error}; {advice}") from error.__cause__

    @contextlib.contextmanager
    def _named_failure(self, step: int) -> Iterator[None]:
        """Turns what the system, Orbax and TensorStore raise when they cannot write into an OSError of one line."""
        try:
            yield
        except Exception as error:
            if not (isinstance(error, OSError | ValueError | RuntimeError) or type(error) is Exception):
                raise  # a mistake of ours
            # The system's own reason is in it as a text only, if it comes from TensorStore by way of Orbax.
            text = reason(error.__cause__ or error)
            full = any(os.strerror(number) in text for number in FULL)
            advice = "free some space" if full else "see that the folder can be written"
            raise OSError(
                f"step {step} could not be saved in {self.folder}: {text}; earlier steps are untouched: {advice}, and "
                "resume"
            ) from error

    def _check_arrays(self, manifest: Manifest, wanted: Mapping[str, Any]) -> None:
        found = manifest.arrays
        kinds = {
            "arrays missing in it": [name for name in wanted if name not in found],
            "arrays too many": [name for name in found if name not in wanted],
            "of another shape": [
                f"{name}: {found[name].shape}, expected {tuple(leaf.shape)}"
                for name, leaf in wanted.items()
                if name in found and found[name].shape != tuple(leaf.shape)
            ],
            "of another dtype": [
                f"{name}: {found[name].dtype}, expected {leaf.dtype}"
                for name, leaf in wanted.items()
                if name in found and found[name].dtype != str(leaf.dtype)
            ],
        }
        if any(kinds.values()):
            raise ValueError(
                f"step {manifest.step} in {self.folder} is of another model or optimizer: {listing(kinds)}; resume "
                "with the options that it was saved with"
            )

    def _prepared(self, step: int) -> int:
        """Removes what interrupted saves left behind; returns the number of the state that is to be written."""
        number = 0
        if jax.process_index() == 0:
            torn = {self.place(step)}
            if self._saves == 1 and self.folder.exists():
                torn |= {entry for entry in self.folder.iterdir() if STEP_NAME.fullmatch(entry.name)}
            for place in torn:
                if place.exists():
                    _remove_remains(place, self._files)
            states = _states(self.place(step)) if self.place(step).exists() else {}
            number = 1 + max(states.values(), default=-1)
        return int(_from_first(np.int32(number)))

    def _agreed(self, commit: Any, where: epath.Path, state: str) -> None:
        """Lets the first process commit `state`, and the others wait until it has."""
        try:
            if jax.process_index() == 0:
                commit()
        finally:
            if jax.process_count() > 1:
                name = f"{where}#{self._saves}"
                waiting = ocp.multihost.sync_global_processes("commit", operation_id=name, timeout=_COMMIT_SECONDS)
                asyncio.run(waiting)
        # Where a step was to be replaced, the manifest of the old one is there in any case.
        if not (where / MANIFEST).exists() or read_manifest(where).state != state:
            raise OSError("the first process could not finish it")

    def _commit(self, manifest: Manifest, files: Mapping[str, bytes], later: Iterable[int]) -> None:
        """Adds the small files, and then, in one piece, the manifest: from then on the step is there.

        A step that is replaced keeps its own files until then; new ones wait beside them under other names.
        """
        place = self.place(manifest.step)
        replaces = (place / MANIFEST).exists()
        waiting = {}
        for name, content in files.items():
            there = (place / name).exists()
            if there and (place / name).read_bytes() == content:
                continue
            if there and replaces:
                waiting[name] = hashlib.sha256(content).hexdigest()
            (place / (_NEW + name if name in waiting else name)).write_bytes(content)
        local = "://" not in str(place)
        if local:
            sync_tree(Path(place))
        manifest = Manifest(**vars(manifest) | {"files": small_files(place, manifest.state) | waiting})
        partial = place / _PARTIAL
        partial.write_bytes(manifest.to_bytes())
        if local:
            sync(Path(partial))
        for step in later:
            (self.place(step) / MANIFEST).replace(self.place(step) / _ABANDONED)
        partial.replace(place / MANIFEST)
        if local:
            sync(Path(place))
        _finish_replacing(place, waiting)
        if local:
            sync(Path(place))
            sync(Path(self.folder))

    def _remove_old(self, place: epath.Path, state: str) -> None:
        """What the step in `place`, now that `state` of it is saved, leaves no use for."""
        try:
            (place / _ABANDONED).unlink(missing_ok=True)
            _remove_states(place, {state})
            for step in set(self.steps()) - kept(self.steps(), self._keep_last, self._keep_every):
                _remove_step(self.place(step))
        except OSError as error:
            # The step is saved; what could not be removed is tried again after the next one.
            _LOG.warning("an old checkpoint could not be removed: %s", reason(error))


def kept(steps: Iterable[int], last: int, every: int | None) -> set[int]:
    """Which of the steps stay: the newest `last`, and multiples of `every` but 0."""
    ordered = sorted(steps)
    return {*ordered[-last:], *(step for step in ordered if every and step and step % every == 0)}


def _named(tree: Any) -> tuple[dict[str, Any], Any]:
    """Every array of a pytree by its dotted path, such as params.norm.scale, and the tree's structure."""
    leaves, structure = jax.tree.flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(named) == len(leaves) and not any("/" in name for name in named), "paths must be unique and plain"
    assert all(isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and leaf.size for leaf in named.values())
    return named, structure


def _context(arrays: Mapping[str, Any]) -> ocp.Context:
    """How arrays lie on the disk: plain numbers, in files of a size that can be read one at a time."""

    def options(path: Any, array: Any) -> Any:
        name = path[-1].key
        large = arrays[name].size * arrays[name].dtype.itemsize > CHUNK_BYTES
        # Layers, and experts, in files of their own: who reads one of them reads no other.
        axes = tuple(range(2 if arrays[name].ndim > 3 else 1)) if large and ".layers." in name else None
        return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=axes)

    context = ocp.Context()
    # A folder that cannot be made is found out at once; in the background Orbax would wait for it for minutes.
    context.asynchronous.create_directories_asynchronously = False
    saving = context.array.saving
    saving.use_ocdbt = saving.use_compression = False  # every bit of a file is then one of a number, or checked itself
    saving.enable_write_sharding_file = False  # of no use where the mesh may be another
    saving.array_metadata_store = None
    saving.min_slice_bytes_for_replica_parallel = CHUNK_BYTES  # copies share the work, but not down to a few bytes
    saving.scoped_storage_options_creator = options
    return context


def _from_first(value: np.int32) -> Any:
    """What the first process has, on every process."""
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)


def _states(place: epath.Path) -> dict[str, int]:
    """The number of each folder in a step folder that Orbax wrote or began to write."""
    matches = {entry.name: _STATE.fullmatch(entry.name) for entry in place.iterdir()}
    return {name: int(match[1]) for name, match in matches.items() if match}


def _remove_states(place: epath.Path, keep: set[str]) -> None:
    for name in _states(place).keys() - keep:
        (place / name).rmtree()


def _finish_replacing(place: epath.Path, files: Mapping[str, str]) -> None:
    """Gives new files that the manifest names, by their sha256, their names, if a save was killed before it could."""
    for name, digest in files.items():
        new = place / (_NEW + name)
        if "/" not in name and new.exists():
            # Whichever process comes first.
            with contextlib.suppress(FileNotFoundError):
                if hashlib.sha256(new.read_bytes()).hexdigest() == digest:
                    new.replace(place / name)


def _remove_remains(place: epath.Path, files: Iterable[str]) -> None:
    """Of a save that never got to its end: what no manifest names. Leaves alone what is not ours, or cannot be read.

    Args:
      files: the names of the model's, which come before the manifest.
    """
    keep = set()
    for name in (MANIFEST, _ABANDONED):
        if (place / name).exists():
            try:
                manifest = json.loads((place / name).read_bytes())
                keep.add(manifest["state"])
                if name == MANIFEST:
                    _finish_replacing(place, manifest["files"])
            except (ValueError, KeyError, TypeError, AttributeError):
                return
    _remove_states(place, keep)
    (place / _PARTIAL).unlink(missing_ok=True)
    for entry in place.iterdir():
        if entry.name.startswith(_NEW) or (not keep and entry.name in files):
            entry.unlink()
    if not any(place.iterdir()):
        place.rmdir()


def _remove_step(place: epath.Path) -> None:
    """Removes a step, its manifest first, so that it is never there in part. Files that are not ours stay."""
    try:
        files = read_manifest(place).files
    except ValueError:
        return  # damaged: somebody may want to look at it
    (place / MANIFEST).unlink()
    _remove_states(place, set())
    for name in files:
        if "/" not in name:
            (place / name).unlink(missing_ok=True)
    if not any(place.iterdir()):
        place.rmdir()
