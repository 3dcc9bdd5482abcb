"""Saved prefixes: a cache as one safetensors file in a folder, written as a whole and checked as it is read.

The file holds what the cache holds of every layer (keys and values, or their 8 bits with scales, spots and the bias
that keys lack) and what sparse prefill recalled; in its metadata a JSON text says the kind of the cache, the model's
fingerprint, the settings, where rows begin, and a CRC-32 of every tensor. The text has a CRC-32 of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from qwen_longctx.checkpoint import Shape
from qwen_longctx.config import KV_CACHES, Geometry, LongContextConfig, Sparse
from qwen_longctx.errors import DoesNotFit, InvalidType, InvalidValue, MissingFile, PatchConflict, Unsupported
from qwen_longctx.files import check_writable, is_leftover, remove_leftovers, replacing
from qwen_longctx.geometry.layout import Origin
from qwen_longctx.kv.fingerprint import base_of, differences, fingerprint
from qwen_longctx.kv.host import HostStore
from qwen_longctx.kv.pinned import free_host_bytes
from qwen_longctx.kv.sequence import ModelRef, Sequence, Written, origins_of
from qwen_longctx.kv.store import STEP, Store
from qwen_longctx.ops.device import device_of
from qwen_longctx.ops.eight_bit import TILE, KeyBias
from qwen_longctx.sparsity.record import DenseRecord, SpanRecord, SparseState

FILE_NAME = "prefix.safetensors"
_VERSION = 2
_KNOWN = (1, 2)  # the first knew no kinds of caches but "device"
_ABOUT, _CHECK = "qwen_longctx_prefix", "qwen_longctx_prefix_crc32"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NAMES = {**_DTYPES, torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8"}  # of all that caches hold
_RECALL, _BUDGETS = "sparse.recall", "sparse.budgets"
_BIAS = ("bias.vector", "bias.tile", "bias.turns")  # of a `KeyBias`, whose scaling is a number
_SPARSE = (*(part.name for part in fields(Sparse)), "prefill_chunk_size")  # count where a prefix is sparse
_PIECE = 1 << 24  # bytes that are checked and copied at a time: they stay in the processor's cache
_THREADS = 8
_LONGEST_HEADER = 100_000_000  # bytes, of the format


Parts = list[torch.Tensor] | tuple[torch.Tensor, ...]  # of a tensor, following one another along its tokens


class _Tensor(NamedTuple):
    """A tensor that goes into a file; `size` is in bytes."""

    name: str
    parts: Parts

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def size(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def shape(self) -> list[int]:
        shape = list(self.parts[0].shape)
        tokens = min(1, len(shape) - 1)
        shape[tokens] = sum(part.shape[tokens] for part in self.parts)
        return shape


# --- writing ------------------------------------------------------------------------------------------------------


def write(cache: Any, folder: Any) -> None:
    """Save a cache. See `LongContextCache.save`."""
    tensors, about = _contents(cache)
    path = _place(folder) / FILE_NAME
    check_writable(path)
    needed, free = sum(one.size for one in tensors), shutil.disk_usage(path.parent).free
    if needed > free:
        raise InvalidValue(
            f"cannot save to {folder}: the prefix takes {needed:,} bytes and {free:,} are free (an earlier prefix "
            "stays until the new one is whole). Free space there, or name another folder"
        )
    remove_leftovers(path.parent, path.suffix)
    with replacing(path) as fresh, fresh.open("wb") as file:
        checksums = {one.name: f"{0:08x}" for one in tensors}
        file.write(_header(tensors, about, checksums))
        for one in tensors:
            checksum = 0
            for piece in _pieces(one.parts):
                content = _bytes(piece.detach().cpu().contiguous())
                checksum = zlib.crc32(content, checksum)
                file.write(content)
            checksums[one.name] = f"{checksum:08x}"
        file.seek(0)
        file.write(_header(tensors, about, checksums))  # of the same length


def _contents(cache: Any) -> tuple[list[_Tensor], dict[str, Any]]:
    """The tensors of a cache in the order of the file, and what is to be known of them; refuses what is not whole."""
    state: Sequence = cache.qwen_longctx
    length = _whole_length(cache, state)
    writer = _writer(state, length)
    stores: list[Store] = [layer.store for layer in cache.layers]
    _, dtype = stores[0].size()
    if dtype not in _DTYPES:
        raise Unsupported(f"keys of {dtype} cannot be saved: fill the cache in {', '.join(map(str, _DTYPES))}")
    base = writer.model()
    if base is None:
        raise PatchConflict(
            "the model that filled this cache is gone, and a prefix is saved with its fingerprint: save before the "
            "model is deleted, and not from a pickled cache"
        )
    recall, budgets, record = _record(state.sparse)
    shape = Shape.of(base.config)
    tensors = [_Tensor(_RECALL, [recall]), _Tensor(_BUDGETS, [budgets])]
    biases = [getattr(store, "bias", None) for store in stores]
    for number, (store, bias) in enumerate(zip(stores, biases, strict=True)):
        names = store.forms(shape.kv_heads, shape.head_dim, dtype)
        tensors += [_Tensor(_name(number, name), x) for name, x in zip(names, store.parts(length), strict=True)]
        if bias is not None:
            tensors += [_Tensor(_name(number, name), [x]) for name, x in zip(_BIAS, bias[:-1], strict=True)]
    tensors.sort(key=lambda one: -one.dtype.itemsize)  # the widest numbers first: they stay aligned
    about = {
        "version": _VERSION,
        "length": length,
        "kv_cache": "device" if cache.kv_cache == "host" else cache.kv_cache,  # the same numbers
        "rows": stores[0].parts(length)[0][0].shape[0],
        "layers": len(stores),
        "dtype": str(dtype),
        "scalings": [None if bias is None else bias.scaling for bias in biases],
        "origins": origins_of(cache),
        "settings": _plain(writer.settings),
        "model": fingerprint(base),
        "prefill": [state.prefill_tokens, state.prefill_seconds, state.peak_memory_bytes],
        "sparse": record,
    }
    return tensors, about


def _whole_length(cache: Any, state: Sequence) -> int:
    """Tokens that all layers hold.

    Raises
    ------
    ValueError, PatchConflict
        There are none, or they are not those of calls that came to their end.
    """
    if state.running or state.settings is not None:
        raise PatchConflict("a call is filling this cache, which cannot be saved meanwhile: save when it has returned")
    lengths = {layer.get_seq_length() for layer in cache.layers}
    if not lengths or lengths == {0}:
        raise InvalidValue("the cache is empty, and there is nothing to save: prefill a prompt with it first")
    if state.broken or len(lengths) > 1:
        why = state.broken or f"its layers hold from {min(lengths)} to {max(lengths)} tokens"
        raise PatchConflict(f"the cache was interrupted and cannot be saved ({why}): prefill with a new cache")
    (length,) = lengths
    if length > state.length or not origins_of(cache):
        raise PatchConflict(
            f"the cache holds {length} tokens, of which a patched model wrote {state.length}: only those of a patched "
            "model are saved. Prefill the prompt with a new cache and a patched model"
        )
    return length


def _writer(state: Sequence, length: int) -> Written:
    """Who wrote the first `length` tokens.

    Raises
    ------
    PatchConflict
        Several did, whose keys and values do not belong together.
    """
    written = [entry for entry in state.written if entry.start < length]
    if not written or written[0].start > 0:
        raise PatchConflict(
            f"a patched model did not write the first {written[0].start if written else length} tokens of the cache: "
            "prefill the prompt with a new cache and a patched model"
        )
    first = written[0]
    for entry in written[1:]:
        wrong = _other_settings(_plain(first.settings), entry.settings, bool(state.sparse.records))
        if entry.model() is not first.model():
            wrong.append("another model wrote them")
        if wrong:
            raise PatchConflict(
                f"the tokens from number {entry.start} on do not belong to those before ({'; '.join(wrong)}): "
                f"crop({entry.start}) takes the cache back, or prefill with a new one"
            )
    return first


def _place(folder: Any) -> Path:
    """The folder to save to, behind links, if it is new, empty or holds a saved prefix."""
    path = _path(folder)
    try:
        if not path.exists():
            return path
        if not path.is_dir():
            raise InvalidValue(f"cannot save to {folder}: it is a file. Name a folder")
        held = sorted(name for name in os.listdir(path) if not is_leftover(name, Path(FILE_NAME).suffix))
    except OSError as error:
        raise InvalidValue(f"cannot save to {folder}: {error.strerror or error}. Name another folder") from error
    if held and not _is_prefix(path / FILE_NAME):
        raise InvalidValue(
            f"cannot save to {folder}: it holds {held[0]!r} and no saved prefix, and nothing else is replaced. Name a "
            "new or an empty folder"
        )
    return path


def _path(folder: Any) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or isinstance(os.fspath(folder), bytes):
        raise InvalidType(f"folder must be a path, got {folder!r:.80}")
    if not os.fspath(folder):
        raise InvalidValue("the name of the folder is empty: name a folder")
    try:
        return Path(folder).resolve()
    except (RuntimeError, ValueError, OSError) as error:  # links in a circle, or a character that no path may hold
        raise InvalidValue(f"{folder!r} is no folder: {error}. Name another one") from error


def _is_prefix(path: Path) -> bool:
    """Whether a file begins as saved prefixes do; it may be cut."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= _LONGEST_HEADER else {}
        return _ABOUT in header["__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _header(tensors: list[_Tensor], about: dict[str, Any], checksums: dict[str, str]) -> bytes:
    text = json.dumps({**about, "checksums": checksums})
    header: dict[str, Any] = {"__metadata__": {_ABOUT: text, _CHECK: _crc(text)}}
    start = 0
    for one in tensors:
        stop = start + one.size
        header[one.name] = {"dtype": _NAMES[one.dtype], "shape": one.shape, "data_offsets": [start, stop]}
        start = stop
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    if len(content) > _LONGEST_HEADER:
        raise Unsupported(f"what is to be known of this cache takes {len(content)} bytes, more than safetensors takes")
    return len(content).to_bytes(8, "little") + content


# --- reading ------------------------------------------------------------------------------------------------------


def read(make: Callable[..., Any], folder: Any, model: Any, settings: LongContextConfig, capacity: int) -> Any:
    """Load a cache, which ``make(capacity, kv_cache=kind)`` makes. See `LongContextCache.load`."""
    base = base_of(model)
    path = _found(folder)
    try:
        with safe_open(path, framework="pt") as file:
            about = _about(file, path)
            _check(about, base, settings, path)
            kind = "host" if (about["kv_cache"], settings.kv_cache) == ("device", "host") else about["kv_cache"]
            cache = make(max(capacity, about["length"] + STEP), kv_cache=kind)
            _fill(cache, file, about, base, path)
            recall, budgets = (_checked(file, name, about, path) for name in (_RECALL, _BUDGETS))
    except (SafetensorError, OSError) as error:
        raise InvalidValue(f"{path} is damaged or no safetensors file ({error}): save the prefix again") from error
    state: Sequence = cache.qwen_longctx
    state.length = about["length"]
    state.written = [Written(0, settings, ModelRef(base))]
    state.prefill_tokens, state.prefill_seconds, state.peak_memory_bytes = about["prefill"]
    devices = [layer.store.buffers[0].device for layer in cache.layers]
    _restore(state.sparse, about["sparse"], recall, budgets, devices)
    cache.layers[0].origins = tuple(Origin(*origin) for origin in about["origins"])
    return cache


def _found(folder: Any) -> Path:
    path = _path(folder)
    try:
        if path.exists() and not path.is_dir():
            raise InvalidValue(f"{folder} is a file: name the folder that a prefix was saved to")
        with (path / FILE_NAME).open("rb"):
            return path / FILE_NAME
    except OSError as error:
        raise MissingFile(
            f"there is no saved prefix in {folder}: {FILE_NAME} cannot be read ({error.strerror or error})"
        ) from error


def _about(file: Any, path: Path) -> dict[str, Any]:
    """What a file says of itself.

    Raises
    ------
    ValueError
        It was not saved by this package, by a release with another format, or is damaged.
    """
    metadata = file.metadata() or {}
    if _ABOUT not in metadata:
        raise InvalidValue(f"{path} holds no saved prefix: it was not written by LongContextCache.save")
    text = metadata[_ABOUT]
    if metadata.get(_CHECK) != _crc(text):
        raise InvalidValue(f"{path} is damaged: its metadata do not have their checksum. Save the prefix again")
    about = json.loads(text)
    if about["version"] not in _KNOWN:
        raise InvalidValue(
            f"{path} has version {about['version']} of the format, this release knows "
            f"{' and '.join(map(str, _KNOWN))}: save the prefix again"
        )
    if about["version"] == 1:
        about |= {"kv_cache": "device", "scalings": [None] * about["layers"]}
    if about["kv_cache"] not in KV_CACHES:
        raise InvalidValue(
            f"{path} holds a cache of kind {about['kv_cache']!r}, this release knows {', '.join(KV_CACHES)}: save the "
            "prefix again"
        )
    return about


def _check(about: dict[str, Any], base: Any, settings: LongContextConfig, path: Path) -> None:
    """Refuse the prefix of another model or of other settings; say everything that differs."""
    wrong = differences(about["model"], json.loads(json.dumps(fingerprint(base))))
    if wrong:
        raise PatchConflict(
            f"the prefix in {path.parent} was saved by another model than this one: {'; '.join(wrong)}. Load it with "
            "the model that it was saved by, or save it again"
        )
    wrong = _other_settings(about["settings"], settings, bool(about["sparse"]["records"]))
    if wrong:
        raise PatchConflict(
            f"the prefix in {path.parent} was saved under other settings than this model is patched with: "
            f"{'; '.join(wrong)}. Patch with the same, or save it again"
        )


def _other_settings(saved: dict[str, Any], settings: LongContextConfig, sparse: bool) -> list[str]:
    """How settings differ from saved ones in what keys and values depend on."""
    present = _plain(settings)
    names = [part.name for part in fields(Geometry)] + [name for name in _SPARSE if sparse]
    return [
        f"{name} is {present[name]!r} and was {saved.get(name)!r}" for name in names if saved.get(name) != present[name]
    ]


def _fill(cache: Any, file: Any, about: dict[str, Any], base: Any, path: Path) -> None:
    """Copy keys and values from the mapped file to the devices of their layers, and check them on the way."""
    shape, dtype = Shape.of(base.config), {str(dtype): dtype for dtype in _DTYPES}[about["dtype"]]
    forms = cache.layer_class_to_replicate().store.forms(shape.kv_heads, shape.head_dim, dtype)
    cells = about["rows"], about["length"]
    mapped, stores = [], []
    for number in range(about["layers"]):
        names = [_name(number, part) for part in forms]
        held = [
            _mapped(file, name, (*cells, *form.shape), form.dtype, path)
            for name, form in zip(names, forms.values(), strict=True)
        ]
        device = device_of(base.layers[number])
        bias = _bias(file, number, shape, dtype, about, path)
        try:
            store = allocated(cache, number, shape, dtype, about["rows"], device)
            if bias is not None:
                store.bias = bias.to(device)
        except torch.OutOfMemoryError as error:
            size = sum(x.nbytes for x in held)
            raise DoesNotFit(
                f"the prefix in {path.parent} does not fit on {device}: keys and values of a layer take {size:,} "
                f"bytes, and layer {number} found no room. Free memory there, or spread the model over several devices"
            ) from error
        mapped.append((names, held))
        stores.append(store)
    _check_host(stores, about, path)
    jobs = [
        job
        for (names, held), store in zip(mapped, stores, strict=True)
        for job in zip(names, held, store.parts(about["length"]), strict=True)
    ]
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    try:
        found = pool.map(lambda job: _crc_of(job[1], job[2]), jobs)
        for (name, *_), checksum in zip(jobs, found, strict=True):
            _compare(checksum, name, about, path)
    finally:
        pool.shutdown(cancel_futures=True)
    for layer in cache.layers:
        layer.store.length = about["length"]


def _check_host(stores: list[Any], about: dict[str, Any], path: Path) -> None:
    """Refuse a prefix whose keys and values the host's memory cannot hold, before any of it is taken."""
    needed = sum(store.missing_bytes(about["length"]) for store in stores if isinstance(store, HostStore))
    free = free_host_bytes() if needed else None
    if free is not None and needed > free:
        raise DoesNotFit(
            f"the prefix in {path.parent} needs {needed:,} bytes of host memory for keys and values of "
            f"{about['rows']} x {about['length']:,} tokens, and {free:,} are free. Free memory, or load it to the "
            'device: patch_qwen(model, kv_cache="device")'
        )


def allocated(cache: Any, number: int, shape: Shape, dtype: torch.dtype, rows: int, device: torch.device) -> Any:
    """The store of a layer on its device, with room for tokens and still empty."""
    none = torch.empty((rows, 0, shape.kv_heads, shape.head_dim), dtype=dtype, device=device)
    return cache.append(none, none, number)


def _bias(
    file: Any, number: int, shape: Shape, dtype: torch.dtype, about: dict[str, Any], path: Path
) -> KeyBias | None:
    """What all keys of a layer lack, on the host."""
    scaling = about["scalings"][number]
    if scaling is None:
        return None
    heads, dim = shape.kv_heads, shape.head_dim
    forms = ((heads, dim), torch.float32), ((heads, TILE, dim), dtype), ((dim // 2,), torch.float64)
    names = [_name(number, part) for part in _BIAS]
    for name, form in zip(names, forms, strict=True):
        _mapped(file, name, *form, path)
    vector, tile, turns = (_checked(file, name, about, path) for name in names)
    return KeyBias(vector, tile, turns, scaling)


def _mapped(file: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype, path: Path) -> torch.Tensor:
    """A tensor of the mapped file, of which nothing has been read yet."""
    try:
        tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise InvalidValue(f"{path} is damaged: it lacks {name}. Save the prefix again") from error
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise InvalidValue(
            f"{path} is damaged: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and should be {dtype} of "
            f"shape {shape}. Save the prefix again"
        )
    return tensor


def _checked(file: Any, name: str, about: dict[str, Any], path: Path) -> torch.Tensor:
    """A copy of a small tensor of the file."""
    tensor = file.get_tensor(name).clone()
    _compare(_crc_of(tensor), name, about, path)
    return tensor


def _compare(checksum: str, name: str, about: dict[str, Any], path: Path) -> None:
    if checksum != about["checksums"][name]:
        raise InvalidValue(
            f"{path} is damaged: {name} has the checksum {checksum} and was saved with {about['checksums'][name]}. "
            "Save the prefix again"
        )


def _crc_of(source: torch.Tensor, targets: Parts = ()) -> str:
    """The CRC-32 of a tensor on the host, which is copied to `targets` on the way: the file is read once."""
    checksum = 0
    copies = _pieces(targets)
    for piece in _pieces(source.split([part.shape[1] for part in targets], 1) if targets else (source,)):
        checksum = zlib.crc32(_bytes(piece), checksum)
        if targets:
            next(copies).copy_(piece)
    return f"{checksum:08x}"


# --- both ---------------------------------------------------------------------------------------------------------


def _name(layer: int, part: str) -> str:
    return f"layers.{layer}.{part}"


def _plain(settings: LongContextConfig) -> dict[str, Any]:
    """Settings as JSON has them."""
    return json.loads(json.dumps(asdict(settings), default=str))


def _pieces(parts: Parts) -> Iterator[torch.Tensor]:
    """A tensor that is given in parts, in its order and piece by piece; each lies in one stretch if a row does."""
    if not parts or parts[0].ndim == 1:
        yield from parts
        return
    step = max(1, _PIECE // max(1, parts[0][0, :1].nbytes))
    for rows in zip(*parts, strict=True):
        for row in rows:
            yield from row.split(step)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _record(sparse: SparseState) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """What sparse prefill recalled and the budgets that it steered, as two flat tensors and what belongs to them."""
    records = [
        (r.layer, r.start, r.stop, r.kernel, float(r.kept), r.pairs, str(r.recall.dtype), r.recall.shape)
        for r in sparse.records
    ]
    budgets = [(rule, layer, len(budget)) for (rule, layer), budget in sparse.budgets.items()]
    recall = _flat([r.recall for r in sparse.records])
    return recall, _flat(list(sparse.budgets.values())), {"records": records, "dense": sparse.dense, "budgets": budgets}


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    parts = [x.detach().flatten().to("cpu", torch.float64) for x in tensors]
    return torch.cat([torch.empty(0, dtype=torch.float64, device="cpu"), *parts])


def _restore(
    sparse: SparseState,
    record: dict[str, Any],
    recall: torch.Tensor,
    budgets: torch.Tensor,
    devices: list[torch.device],
) -> None:
    """Put back what `_record` took, on the devices of the layers."""
    numbers = [shape[0] * shape[1] for *_, shape in record["records"]]
    parts = recall.split(numbers) if numbers else ()
    dtypes = {str(dtype): dtype for dtype in _DTYPES}
    for (layer, start, stop, kernel, kept, pairs, dtype, shape), part in zip(record["records"], parts, strict=True):
        blocks = torch.tensor(kept, dtype=torch.float64, device="cpu")
        part = part.to(dtypes[dtype]).view(shape)
        sparse.records.append(SpanRecord(layer, start, stop, kernel, part, blocks, pairs))
    sparse.dense = [DenseRecord(*entry) for entry in record["dense"]]
    sizes = [size for *_, size in record["budgets"]]
    for (rule, layer, _), part in zip(record["budgets"], budgets.float().split(sizes) if sizes else (), strict=True):
        sparse.budgets[rule, layer] = part.to(devices[layer])
    sparse.check()  # as a prefill does at its end, so that the next one looks at its own records only
