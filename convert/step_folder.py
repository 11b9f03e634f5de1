"""A step folder: what training saves, on its disk or in a bucket.

    config.json, tokenizer.json, ...     of the model, as in every checkpoint
    state-<n>/state/<array>/...          one directory per array: zarr 3, uncompressed, written by Orbax
    state-<n>/...                        what else Orbax writes
    manifest.json                        the arrays with a digest each, the sha256 of every small file and of itself

The manifest is written last, in one piece: a folder without one holds no step. One that is saved again gets another <n>
beside the first, and the new manifest takes the step from the one to the other; until then the model's files, if others
than before, wait as .new.<name>.

The folder may be in a bucket: every Path here may as well be the `etils.epath.Path` of one.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from convert.digest import Digest
from convert.files import cores, listing
from qwen2_jax.json_object import brief, parse_json

MANIFEST = "manifest.json"
FORMAT, VERSION = "qwen2_jax training step", 1
STEP_NAME = re.compile(r"\d{8,}")
"""Of a step folder: its number."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array of a step."""

    dtype: str
    shape: tuple[int, ...]
    digest: str
    """`convert.digest`, as text."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a step folder says of itself."""

    step: int
    state: str
    """The folder in it that Orbax wrote."""
    arrays: dict[str, Stored]
    """By dotted path in the training state, such as params.norm.scale."""
    files: dict[str, str]
    """The sha256 of every file but those that hold numbers, by path in the step folder."""
    extra: dict[str, Any]
    """What the training loop wants to find again."""

    def to_bytes(self) -> bytes:
        """manifest.json, as `read_manifest` reads it."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps({"sha256": _sha256(content), **content}, allow_nan=False).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step folder, once it is known to be what was written.

    Raises:
      ValueError: if the manifest is damaged, of another version, or that of something else.
      OSError: if it cannot be read.
    """
    path = folder / MANIFEST
    try:
        content = parse_json(path.read_bytes(), str(path))
        claimed = content.pop("sha256")
        sound = claimed == _sha256(content)
    except (ValueError, KeyError, AttributeError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is damaged: it is not what was written")
    # From here on it is what some version of this program wrote.
    if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        found = f"{brief(content.get('format'))} {brief(content.get('version'))}"
        raise ValueError(f"{path} is of {found}, this program reads {FORMAT!r} {VERSION}")
    arrays = {
        name: Stored(entry["dtype"], tuple(entry["shape"]), entry["digest"])
        for name, entry in content["arrays"].items()
    }
    return Manifest(content["step"], content["state"], arrays, content["files"], content["extra"])


def is_step_folder(folder: Path) -> bool:
    """Whether the manifest in `folder`, damaged or not, is that of a training step."""
    path = folder / MANIFEST
    return path.exists() and FORMAT.encode() in path.read_bytes()[:1000]


def is_unfinished(folder: Path) -> bool:
    """Whether `folder` has the name of a step and what Orbax writes of one, but no manifest."""
    return (
        STEP_NAME.fullmatch(folder.name) is not None
        and not (folder / MANIFEST).exists()
        and any(folder.glob("state-*"))
    )


def newest_step(folder: Path) -> Path | None:
    """Of a training run, for somebody who took the folder of the run, or of its checkpoints, for a step."""
    for place in (folder / "checkpoints", folder):
        numbered = [step for step in place.glob("*") if STEP_NAME.fullmatch(step.name)]
        if whole := [step for step in numbered if (step / MANIFEST).is_file()]:
            return max(whole, key=lambda step: int(step.name))
    return None


def meant_step(path: Path) -> Path | None:
    """The step 00000300 beside `path`, which is not there, if that is named 300."""
    step = path.parent / path.name.zfill(8)
    named = path.name and STEP_NAME.fullmatch(step.name)  # not "."
    return step if named and os.path.isfile(step / MANIFEST) else None


def small_files(folder: Path, state: str) -> dict[str, str]:
    """The sha256 by path in `folder` of what lies directly in it and, of `state`, of all but the numbers."""

    def walk(directory: Path, prefix: str) -> Iterator[tuple[str, Path]]:
        for entry in sorted(directory.iterdir(), key=lambda entry: entry.name):
            if not entry.is_dir():
                yield prefix + entry.name, entry
            elif entry.name != "c":
                yield from walk(entry, f"{prefix}{entry.name}/")

    here = ((entry.name, entry) for entry in folder.iterdir() if not entry.is_dir())
    found = {name: entry for name, entry in here if not name.startswith(("manifest.", "."))}
    found.update(
        # An array without axes keeps its one number in a file "c" and not in a folder of that name.
        (name, entry)
        for name, entry in walk(folder / state, f"{state}/")
        if not name.endswith("/c")
    )
    return {name: hashlib.sha256(entry.read_bytes()).hexdigest() for name, entry in found.items()}


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares the small files with the manifest.

    Raises:
      ValueError: for one that is missing or damaged, naming it, and its array if it has one.
    """

    def wrong(item: tuple[str, str]) -> str:
        name, digest = item
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            return f"{_owner(name)}{folder / name} cannot be read: {error.strerror or error}"
        if hashlib.sha256(content).hexdigest() != digest:
            return f"{_owner(name)}{folder / name} is damaged: its sha256 differs from the one in {MANIFEST}"
        return ""

    with ThreadPoolExecutor(8) as pool:
        found = list(filter(None, pool.map(wrong, manifest.files.items())))
    if found:
        raise ValueError(found[0] + (f" (and {len(found) - 1} more files)" if len(found) > 1 else ""))


def array_folder(folder: Path, manifest: Manifest, name: str) -> Path:
    """Where the numbers of an array are: a zarr directory."""
    return folder / manifest.state / "state" / name


def open_array(folder: Path, manifest: Manifest, name: str) -> Any:
    """The TensorStore of one array, read-only.

    Raises:
      ValueError: if it is not there, or not what the manifest says.
    """
    import tensorstore  # slow to import, and most of the converter does without

    place, stored = array_folder(folder, manifest, name), manifest.arrays[name]
    where = str(place)
    kvstore = f"{where}/" if "://" in where else {"driver": "file", "path": f"{where}/"}
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False, "recheck_cached_data": False}
    try:
        store = tensorstore.open(spec, open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise ValueError(f"array {name} is damaged: {place} cannot be opened: {reason(error)}") from None
    if store.shape != stored.shape or store.dtype.name != stored.dtype:
        raise ValueError(f"array {name} is damaged: {place} is not of the shape and dtype in {MANIFEST}")
    return store


def read_box(folder: Path, manifest: Manifest, name: str, store: Any, box: tuple[slice, ...]) -> np.ndarray:
    """The numbers of a box of an array that `open_array` opened. Raises ValueError, naming a file as far as it can."""
    try:
        return np.asarray(store[box].read().result())
    except (ValueError, OSError) as error:
        place = array_folder(folder, manifest, name)
        raise ValueError(f"array {name} is damaged: {place} cannot be read: {reason(error)}") from None


def check_array(folder: Path, manifest: Manifest, name: str) -> None:
    """Reads an array, chunk by chunk, and compares its digest with the manifest.

    Raises:
      ValueError: if it is damaged, truncated or incomplete, naming it and where it is.
    """
    store, shape = open_array(folder, manifest, name), manifest.arrays[name].shape
    chunk = store.chunk_layout.read_chunk.shape or ()  # None without axes
    digest = Digest(shape)
    for index in np.ndindex(*(-(-side // part) for side, part in zip(shape, chunk, strict=True))):
        start = tuple(int(i) * part for i, part in zip(index, chunk, strict=True))
        box = tuple(slice(low, min(low + part, side)) for low, part, side in zip(start, chunk, shape, strict=True))
        digest.add(read_box(folder, manifest, name, store, box), start)
    if digest.text() != manifest.arrays[name].digest:
        raise ValueError(damaged(folder, manifest, [name]))


def check_arrays(folder: Path, manifest: Manifest, names: list[str]) -> None:
    """`check_array` of several, a few at a time: those that can be held in some hundred megabytes.

    Raises:
      ValueError: naming the first that is damaged, and how many others are.
    """

    def wrong(name: str) -> str:
        try:
            check_array(folder, manifest, name)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(8, cores())) as pool:
        found = list(filter(None, pool.map(wrong, sorted(names, key=lambda n: -math.prod(manifest.arrays[n].shape)))))
    if found:
        raise ValueError(found[0] + (f" (and {len(found) - 1} more arrays)" if len(found) > 1 else ""))


def damaged(folder: Path, manifest: Manifest, names: list[str]) -> str:
    """What to say of arrays whose numbers are not those that were saved."""
    if len(names) == 1:
        return (
            f"array {names[0]} is damaged: its numbers are not those that were saved (digest in {MANIFEST}); its files "
            f"are {array_folder(folder, manifest, names[0])}/c"
        )
    where = array_folder(folder, manifest, "*")
    return f"{listing({'arrays are damaged': names})}: their numbers are not those that were saved; files {where}/c"


def _owner(file: str) -> str:
    match = re.fullmatch(r"state-\d+/state/([^/]+)/zarr\.json", file)
    return f"array {match[1]} is damaged: " if match else ""


def reason(error: BaseException) -> str:
    """One line on why a file could not be read or written, whether the system, Orbax or TensorStore says so."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split()).partition(" [tensorstore_spec")[0] or type(error).__name__
    # TensorStore tells what it was doing, from the array to the file; the file is what helps.
    if innermost := re.fullmatch(r'.*"([^"]+)": ([^"]+)', text):
        text = f"{innermost[1]}: {innermost[2]}"
    return text if len(text) <= 400 else f"{text[:200]}...{text[-200:]}"


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
