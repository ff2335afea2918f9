"""Checkpoints on disk, as trees whose arrays are read one by one.

Orbax' folders, safetensors, NumPy's `.npz` and Flax' msgpack. Nothing is unpickled, and no device
or mesh is needed: an array comes whole, however many devices or processes wrote its parts.
"""

import contextlib
import dataclasses
import gc
import importlib
import json
import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from optax_constraints._text import shown


class CheckpointError(Exception):
    """Why a checkpoint cannot be read, in one line."""


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """An array of a checkpoint. It is read whenever it is converted, and is not kept."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the array."""
        with _damage(self.name):
            array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __jax_array__(self) -> jax.Array:
        """Reads the array, which JAX on a CPU uses without a copy if it is aligned for that."""
        if math.prod(self.shape) * self.dtype.itemsize >= _LARGE:
            # What JAX took over from NumPy before comes back only when Python collects.
            gc.collect()
        return jax.device_put(np.asarray(self), may_alias=True)


# Bytes that are worth the time, some 0.1 s.
_LARGE = 2**24

Leaves: TypeAlias = dict[tuple[str, ...], Leaf]


class Checkpoint(NamedTuple):
    """What `open_checkpoint` returns."""

    path: Path
    """The file or folder that was chosen."""
    tree: Any
    """Dicts of leaves, nested as the keys are; or one leaf."""
    step: int | None
    """The number of the step, if the checkpoint is one of several in a folder."""


def open_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """Finds the arrays of a checkpoint, and reads none.

    Args:
        path: A file; a folder of Orbax; or a folder of numbered steps, such as that of a
            `CheckpointManager`.
        step: Which step in such a folder; by default the last.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"There is no {str(path)!r}.")
    found = None
    if path.is_dir() and not _is_item(path) and (steps := _steps(path)):
        found = max(steps) if step is None else step
        if found not in steps:
            known = ", ".join(map(str, sorted(steps)))
            raise CheckpointError(f"{str(path)!r} has no step {found}, but {known}.")
        path = steps[found]
    with _damage(str(path)):
        return Checkpoint(
            path, nested(_in_folder(path) if path.is_dir() else _in_file(path)), found
        )


def nested(leaves: Mapping[tuple[str, ...], Leaf]) -> Any:
    """Leaves by their keys as nested dicts; numbers are in their order, not in that of text."""
    if set(leaves) == {()}:
        return leaves[()]
    if () in leaves:
        raise CheckpointError(f"{leaves[()].name!r} is an array, and has others below it.")
    below: dict[str, Leaves] = {}
    for (first, *rest), leaf in leaves.items():
        below.setdefault(first, {})[tuple(rest)] = leaf
    if all(key.isdecimal() for key in below):
        # JAX keeps the order of these, as it does for the list that they may have been.
        return OrderedDict((key, nested(below[key])) for key in sorted(below, key=int))
    return {key: nested(own) for key, own in below.items()}


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """Says of an error of any reader what could not be read."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        # TensorStore appends all that it knows, some thousand characters.
        text = str(error).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]
        raise CheckpointError(
            f"{name!r} cannot be read, and may be damaged: {type(error).__name__}: {text}"
        ) from error


def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Of two equal keys, Python would drop the first."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice.")
        found[key] = value
    return found


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CheckpointError(
            f"To read this, {module} is needed: pip install {module.partition('.')[0]} ({error})."
        ) from error


# Folders.

_UNFINISHED = ".orbax-checkpoint-tmp"


def _is_item(folder: Path) -> bool:
    """Whether a folder is one tree that Orbax saved."""
    return (folder / "_METADATA").is_file()


def _items(folder: Path) -> dict[str, Path]:
    return {own.name: own for own in sorted(folder.iterdir()) if own.is_dir() and _is_item(own)}


def _steps(folder: Path) -> dict[int, Path]:
    """Checkpoints in a folder by the number in which their names end, as in `12` or `step_12`."""
    numbered = ((re.fullmatch(r"(?:.*_)?(\d+)", own.name), own) for own in folder.iterdir())
    return {
        int(match[1]): own
        for match, own in numbered
        if match and (own.is_file() or _is_item(own) or _items(own))
    }


def _in_folder(folder: Path) -> Leaves:
    if _UNFINISHED in folder.name:
        raise CheckpointError(f"{str(folder)!r} is of a save that did not end.")
    if _is_item(folder):
        return _orbax(folder)
    items = _items(folder)
    if not items:
        left = [own.name for own in folder.iterdir() if _UNFINISHED in own.name]
        why = f" Of a save that did not end there is {left[0]!r}." if left else ""
        raise CheckpointError(
            f"{str(folder)!r} is no checkpoint: Orbax' file _METADATA is neither in it nor in a "
            f"folder of it.{why}"
        )
    if len(items) == 1:
        return _orbax(*items.values())
    return {(name, *keys): x for name, own in items.items() for keys, x in _orbax(own).items()}


def _orbax(folder: Path) -> Leaves:
    """A tree that Orbax saved, opened array by array.

    Not through Orbax itself, which restores whole trees onto devices. The format is described in
    its documentation: names and kinds of leaves in JSON, and Zarr arrays by name, which are
    files, or in a database of TensorStore.
    """
    metadata = json.loads((folder / "_METADATA").read_text())
    ts = _needed("tensorstore")
    # More threads would each hold parts of an array in both forms, compressed and not.
    few = {"limit": 2}
    context = ts.Context({"data_copy_concurrency": few, "file_io_concurrency": few})
    base = {"driver": "file", "path": f"{folder.absolute()}/"}
    if (folder / "manifest.ocdbt").is_file():
        base = {"driver": "ocdbt", "base": base}
    elif metadata.get("use_ocdbt"):
        raise CheckpointError(f"{str(folder)!r} has no manifest.ocdbt: its save did not end.")
    stores = {}
    for entry in metadata["tree_metadata"].values():
        kind = entry["value_metadata"]
        if kind.get("skip_deserialize") or kind["value_type"] == "string":
            continue
        keys = tuple(str(key["key"]) for key in entry["key_metadata"])
        store = {**base, "path": f"{base.get('path', '')}{'.'.join(keys)}/"}
        spec = {
            "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
            "kvstore": store,
            # A part that is missing is damage, unless parts that are zero were not saved.
            "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
        }
        stores[keys] = ts.open(spec, open=True, read=True, context=context)
    leaves: Leaves = {}
    for keys, opening in stores.items():
        name = f"{folder}: {'/'.join(keys)}"
        with _damage(name):
            store = opening.result()

        def read(store: Any = store) -> np.ndarray:
            array = _aligned(store.shape, store.dtype.numpy_dtype)
            ts.array(array).write(store).result()
            return array

        leaves[keys] = Leaf(name, tuple(store.shape), store.dtype.numpy_dtype, read)
    return leaves


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address where JAX can use it as it is."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


# Files.


def _in_file(path: Path) -> Leaves:
    """A file of one of three formats, told by its first bytes."""
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK"):
        return _npz(path)
    if head[8:] == b"{":
        return _safetensors(path)
    # A pickle starts as an empty map of msgpack would, which no checkpoint is.
    if head and (0x80 < head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return _msgpack(path)
    what = "is empty" if not head else "is no safetensors, .npz or msgpack of Flax"
    if head[:1] == b"\x80":
        what = "is a pickle, which is never read"
    raise CheckpointError(f"{str(path)!r} {what}.")


def _by_name(arrays: dict[str, Leaf]) -> Leaves:
    """Flat names as keys: split at "/", or where no name has one, at dots."""
    separator = "/" if any("/" in name for name in arrays) else "."
    return {tuple(name.split(separator)): leaf for name, leaf in arrays.items()}


def _npz(path: Path) -> Leaves:
    archive = zipfile.ZipFile(path)
    arrays = {}
    for member in archive.namelist():
        if not member.endswith(".npy"):
            raise CheckpointError(
                f"{str(path)!r} holds {member!r}, so it is no .npz; pickles, as in files of "
                "PyTorch, are never read."
            )
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            headers = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, _, dtype = headers[version](file)
        name = member.removesuffix(".npy")
        if dtype.kind == "V":
            raise CheckpointError(
                f"{str(path)!r} holds {name!r} as raw bytes ({dtype}): NumPy does not save "
                "bfloat16 as such. Save it as float32, or as safetensors."
            )

        def read(member: str = member) -> np.ndarray:
            with archive.open(member) as file:
                return np.lib.format.read_array(file, allow_pickle=False)

        arrays[name] = Leaf(f"{path}: {name}", shape, dtype, read)
    return _by_name(arrays)


_SAFETENSORS = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": jnp.bfloat16,
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
}


def _safetensors(path: Path) -> Leaves:
    """The format: the length of a header in 8 bytes, the header as JSON, and the arrays."""
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > total:
            raise CheckpointError(f"{str(path)!r} ends within its header: it is cut off.")
        header = json.loads(file.read(length), object_pairs_hook=mapping)
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] not in _SAFETENSORS:
            raise CheckpointError(
                f"{str(path)!r} holds {name!r} in {entry['dtype']}, of which nothing is known here."
            )
        dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
        size = math.prod(shape)
        if not 0 <= start <= end == start + size * dtype.itemsize:
            raise CheckpointError(
                f"{str(path)!r} holds {name!r} of shape {shape} in bytes {start} to {end}."
            )
        if 8 + length + end > total:
            raise CheckpointError(f"{str(path)!r} ends within {name!r}: it is cut off.")

        def read(
            shape: Any = shape, dtype: Any = dtype, size: int = size, offset: int = start
        ) -> np.ndarray:
            return np.fromfile(path, dtype, size, offset=8 + length + offset).reshape(shape)

        arrays[name] = Leaf(f"{path}: {name}", shape, dtype, read)
    return _by_name(arrays)


def _msgpack(path: Path) -> Leaves:
    """Flax' form of a state dict. It can only be read as a whole."""
    state = _needed("flax.serialization").msgpack_restore(path.read_bytes())
    return {
        keys: Leaf(f"{path}: {'/'.join(keys)}", array.shape, array.dtype, lambda a=array: a)
        for keys, array in _flat((), state)
    }


def _flat(keys: tuple[str, ...], node: Any) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from _flat((*keys, str(key)), child)
    elif isinstance(node, (np.ndarray, np.generic, int, float, complex)):
        yield keys, np.asarray(node)
    elif node is not None and not isinstance(node, (str, bytes)):
        raise CheckpointError(f"{'/'.join(keys)!r} is {shown(node)}, and no array.")
