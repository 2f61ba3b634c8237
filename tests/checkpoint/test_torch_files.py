"""PyTorch files open as torch opens them; what would run code is refused, and damage is an error, never a crash."""

import functools
import io
import os
import pickle
import pickletools
import random
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from camelid.checkpoint.containers import torch_files, torch_tensors, torch_zip
from camelid.checkpoint.containers.torch_files import (
    MAGIC,
    PROTOCOL,
    open_torch,
    unpickle,
    unverified_note_for,
)
from camelid.checkpoint.containers.torch_tensors import StridedTensor, dump_pickle
from camelid.checkpoint.containers.torch_zip import torch_file, verify_checksums
from camelid.checkpoint.files import write_files
from camelid.checkpoint.tensors import PlannedTensor, Tensor
from camelid.errors import UserError
from writing import in_pieces

BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(value: object, folder: Path, zipped: bool, protocol: int = 2) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path


def read(tensor: Tensor, index: tuple[slice, ...] | None = None, dtype: Any = None) -> np.ndarray:
    index = tuple(slice(0, n) for n in tensor.shape) if index is None else index
    out = np.empty([len(range(n)[s]) for n, s in zip(tensor.shape, index, strict=True)], dtype or tensor.dtype)
    tensor.read_into(out, index)
    return out


def count(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)


def shares() -> dict[str, torch.Tensor]:
    table = count(6, 4)
    return {"table": table, "head": table, "view": table[2:5], "columns": table[:, 1:3], "turned": table[1:].T}


NAMED = [getattr(torch, name) for name in "float32 float16 bfloat16 float64 int64 int32 int16 int8 uint8 bool".split()]
STATES: dict[str, Callable[[], Any]] = {
    "every dtype": lambda: {str(dtype): count(3, 4, dtype=dtype) for dtype in NAMED},
    "views of one storage": shares,
    "turned, bfloat16": lambda: {"odd": torch.ones(3, dtype=torch.int8), "a": count(4, 5, dtype=torch.bfloat16).T},
    "three axes": lambda: {"a": count(2, 3, 4).permute(2, 0, 1), "b": count(2, 3, 4)[:, 1], "c": count(2, 3, 4)},
    "expanded": lambda: {"a": torch.ones(3, 1).expand(3, 4), "b": torch.full((), 7.0).expand(2, 3)},
    "every other": lambda: {"a": count(6, 6)[::2, 1::2]},
    "axes of size one": lambda: {"a": count(4, 3)[:1].T, "b": torch.empty_strided((1, 3), (99, 1)).fill_(2.0)},
    "one number": lambda: {"a": torch.tensor(3.5), "b": count(5)[3]},
    "nothing": lambda: {"a": torch.empty(0), "b": torch.empty(2, 0, 3), "c": torch.empty(0, 3).T, "d": torch.ones(2)},
    "parameters": lambda: {"a": torch.nn.Parameter(count(2, 3)), "b": torch.nn.Parameter(count(2), False)},
    "state_dict()": lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict(),
    "no tensors": dict,
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@BOTH
def test_every_tensor_and_every_part_of_it_is_what_torch_saved(tmp_path: Path, state: Callable[[], Any], zipped: bool):
    held = state()
    path = saved(held, tmp_path, zipped)
    content, opened = path.read_bytes(), open_torch(path)
    assert list(opened) == list(held)
    for name, tensor in opened.items():
        true = held[name].detach()
        assert (tensor.name, tensor.file, tensor.shape) == (name, path, tuple(true.shape))
        assert f"torch.{tensor.dtype.name}" == str(true.dtype)
        assert read(tensor).tobytes() == true.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert (type(tensor) is Tensor) == (true.is_contiguous() and true.dim() > 0)
        if type(tensor) is Tensor:
            size = true.numel() * true.element_size()
            assert content[tensor.offset : tensor.offset + size] == read(tensor).tobytes()
        for index in parts(tensor.shape):
            np.testing.assert_array_equal(read(tensor, index, np.float32), true[index].float().numpy())


def parts(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The whole, then along each axis a part that starts late and one that ends early."""
    whole = tuple(slice(0, n) for n in shape)
    cuts = [(axis, cut) for axis, n in enumerate(shape) for cut in (slice(n // 2, n), slice(0, n // 2))]
    return [whole, *((*whole[:axis], cut, *whole[axis + 1 :]) for axis, cut in cuts)]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@BOTH
def test_later_pickle_protocols_are_read(tmp_path: Path, protocol: int, zipped: bool):
    opened = open_torch(saved(OrderedDict(shares()), tmp_path, zipped, protocol))
    np.testing.assert_array_equal(read(opened["turned"]), shares()["turned"].numpy())


@BOTH
def test_views_of_one_storage_are_byte_ranges_of_it(tmp_path: Path, zipped: bool):
    opened = open_torch(saved(shares(), tmp_path, zipped))
    start = opened["table"].offset
    assert {name: (type(tensor), tensor.offset - start) for name, tensor in opened.items()} == {
        "table": (Tensor, 0),
        "head": (Tensor, 0),
        "view": (Tensor, 32),
        "columns": (StridedTensor, 4),
        "turned": (StridedTensor, 16),
    }


def test_storages_lie_behind_headers_of_any_length(tmp_path: Path):
    path = tmp_path / "model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries(program(view()), SIX).items():
            with archive.open(name, "w", force_zip64=True) as file:  # 20 bytes more in the local header alone
                file.write(content)
    np.testing.assert_array_equal(read(open_torch(path)["w"]), [[0, 1, 2], [3, 4, 5]])


@BOTH
def test_nested_objects_keep_their_form_and_their_tensors(tmp_path: Path, zipped: bool):
    plain = {"steps": [1, -2, 2.5, None, True, False, 10**30, "ü", (), (1,), (1, 2, 3, 4)], "empty": [{}]}
    value = {"model": {"w": count(2, 3)}, 7: [count(2)], "dtype": torch.bfloat16, "size": torch.Size([2, 3]), **plain}
    opened = unpickle(saved(value, tmp_path, zipped))
    np.testing.assert_array_equal(read(opened["model"].pop("w")), count(2, 3).numpy())
    np.testing.assert_array_equal(read(opened[7].pop()), [0, 1])
    assert opened.pop("dtype") == torch_tensors.DTYPES["BFloat16"]
    assert opened == {"model": {}, 7: [], "size": (2, 3), **plain}


@pytest.mark.parametrize(
    ("value", "about"),
    [
        (count(2), "holds a Tensor and not tensors by name"),
        ([count(2)], "holds a list and not"),
        ({"w": count(2), "epoch": 3, "lr": 0.1, "x": None, "y": "z"}, "by name: epoch (a int), lr (a float), x (a "),
        ({"w": count(2), "optimizer": {"lr": 0.1}}, "optimizer (a dict)"),
        ({3: count(2)}, "a number (a Tensor)"),
        ({"\x1b[2J": 1}, r"\x1b[2J (a int)"),
    ],
)
@BOTH
def test_what_is_not_tensors_by_name_is_refused_by_name(tmp_path: Path, value: object, about: str, zipped: bool):
    with pytest.raises(UserError) as refusal:
        open_torch(saved(value, tmp_path, zipped))
    assert about in refusal.value.problem
    assert "torch.save(model.state_dict()" in refusal.value.advice
    assert ("One of them may" in refusal.value.advice) == ("a dict" in about)


# Files that would run code ----------------------------------------------------------------


class Call:
    """An object that pickles to a call of `function`."""

    def __init__(self, function: Any, *arguments: Any, attributes: Any = None):
        self.call = (function, arguments) if attributes is None else (function, arguments, attributes)

    def __reduce__(self) -> Any:
        return self.call


# Under the names that protocol 2 writes, which are those of Python 2.
COMMANDS: dict[str, Callable[[Path], Call]] = {
    "posix.system": lambda file: Call(os.system, f"touch {file}"),
    "__builtin__.eval": lambda file: Call(eval, f"open({str(file)!r}, 'w')"),
    "__builtin__.exec": lambda file: Call(exec, f"open({str(file)!r}, 'w')"),
    "__builtin__.getattr": lambda file: Call(getattr, "", "join"),
    f"{open.__module__}.open": lambda file: Call(open, str(file), "w"),
    "commands.Popen": lambda file: Call(subprocess.Popen, ["touch", str(file)]),
    "functools.partial": lambda file: Call(functools.partial, os.system, f"touch {file}"),
    "torch.serialization.load": lambda file: Call(torch.load, str(file)),
    "numpy.savetxt": lambda file: Call(np.savetxt, str(file), [1.0]),
    "torch._utils._rebuild_sparse_tensor": lambda file: Call(torch._utils._rebuild_sparse_tensor, 1, 2),
}


@pytest.mark.parametrize("command", COMMANDS)
@BOTH
def test_a_file_that_would_run_code_is_refused_by_the_name_of_it_and_nothing_runs(
    tmp_path: Path, command: str, zipped: bool
):
    marker = tmp_path / "ran"
    path = saved({"w": count(2), "x": COMMANDS[command](marker)}, tmp_path, zipped)
    with pytest.raises(UserError) as refusal:
        open_torch(path)
    assert str(path) in refusal.value.problem
    assert f"would call {command} " in refusal.value.problem
    assert "safetensors" in refusal.value.advice
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
@BOTH
def test_the_command_of_these_tests_is_real_and_refused_in_every_protocol(tmp_path: Path, protocol: int, zipped: bool):
    marker = tmp_path / "ran"
    path = saved(COMMANDS["posix.system"](marker), tmp_path, zipped, protocol)
    with pytest.raises(UserError, match=r"would call posix\.system "):
        open_torch(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


# Files that are made by hand --------------------------------------------------------------


class Held:
    """A storage as a pickle speaks of it."""

    def __init__(self, *reference: Any):
        self.reference = reference


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.reference if isinstance(value, Held) else None


SIX = {"0": np.arange(6, dtype=np.float32).tobytes()}


def view(
    offset: Any = 0,
    shape: Any = (2, 3),
    strides: Any = (3, 1),
    *,
    kind: Any = torch.FloatStorage,
    key: Any = "0",
    numbers: Any = 6,
    **more: Any,
) -> Call:
    held = Held("storage", kind, key, "cpu", numbers, *more.get("within", ()))
    hooks: OrderedDict = OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, held, offset, shape, strides, False, hooks, *more.get("metadata", ()))


def program(value: object) -> bytes:
    """A pickle of tensors by name, if `value` is not that already."""
    stream = io.BytesIO()
    Pickler(stream, 2).dump({"w": value} if isinstance(value, Call) else value)
    return stream.getvalue()


def entries(pickled: bytes, storages: dict[str, bytes]) -> dict[str, bytes]:
    data = {f"archive/data/{key}": content for key, content in storages.items()}
    return {"archive/data.pkl": pickled, "archive/byteorder": b"little", "archive/version": b"3\n"} | data


def write(
    path: Path,
    zipped: bool,
    pickled: bytes,
    storages: dict[str, bytes] = SIX,
    *,
    system: Any = None,
    protocol: int = PROTOCOL,
    compression: int = zipfile.ZIP_STORED,
    **more: bytes,
) -> Path:
    """A file of either format, around a pickle; `more` are entries of a zip file."""
    if zipped:
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in (entries(pickled, storages) | {f"archive/{k}": v for k, v in more.items()}).items():
                archive.writestr(name, content)
        return path
    head = (MAGIC, protocol, system or {"little_endian": True})
    content = b"".join(pickle.dumps(part, 2) for part in head) + pickled + pickle.dumps(list(storages), 2)
    for data in storages.values():
        content += struct.pack("<q", len(data) // 4) + data
    path.write_bytes(content)
    return path


def refused(path: Path) -> UserError:
    """The refusal of a file, which names it and took no memory to speak of."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as refusal:
            open_torch(path)
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size * 80 + 2**20
    finally:
        tracemalloc.stop()
    assert str(path) in refusal.value.problem
    assert len(refusal.value.problem) < 600
    return refusal.value


@BOTH
def test_the_files_made_by_hand_open(tmp_path: Path, zipped: bool):
    opened = open_torch(write(tmp_path / "model.bin", zipped, program(view())))
    np.testing.assert_array_equal(read(opened["w"]), [[0, 1, 2], [3, 4, 5]])


TENSORS = {
    "beyond its storage": (view(0, (7,), (1,)), "reaches beyond its storage of 6"),
    "beyond by its offset": (view(1), "reaches beyond"),
    "beyond by its strides": (view(0, (2, 3), (4, 1)), "reaches beyond"),
    "beyond, without any number": (view(7, (0,), (1,)), "reaches beyond"),
    "absurdly large": (view(0, (10**15,), (1,)), "reaches beyond"),
    "strides of astronomical size": (view(0, (2,), (2**62,)), "reaches beyond"),
    "negative offset": (view(-1), "negative"),
    "negative size": (view(0, (-2, -3)), "negative"),
    "negative stride": (view(5, (6,), (-1,)), "negative"),
    "offset not whole": (view(0.0), "negative or too large"),
    "size true": (view(0, (True,), (1,)), "negative or too large"),
    "size beyond 64 bits": (view(0, (2**64, 0), (0, 1)), "negative or too large"),
    "strides missing": (view(0, (2, 3), (3,)), "unsupported fields"),
    "shape a list": (view(0, [2, 3], [3, 1]), "unsupported fields"),
    "too many axes": (view(0, (1,) * 65, (1,) * 65), "unsupported fields"),
    "negated": (view(metadata=({"neg": True},)), "unsupported fields"),
    "no storage": (Call(torch._utils._rebuild_tensor, 1, 0, (2,), (1,)), "unsupported fields"),
    "too few arguments": (Call(torch._utils._rebuild_tensor), "TypeError"),
    "storage of 10**15 numbers": (view(numbers=10**15), "storage 0"),
    "storage of 10**15 numbers, of which one is used": (view(0, (1,), (1,), numbers=10**15), "storage 0"),
    "storage smaller than said": (view(numbers=7), "storage 0"),
    "storage larger than said": (view(0, (1,), (1,), numbers=5), "storage 0"),
    "storage of another dtype": (view(kind=torch.DoubleStorage), "storage 0"),
    "negative storage": (view(0, (0,), (1,), numbers=-1), "-1"),
    "storage missing": (view(key="1"), "Error"),
    "storage with a number for a name": (view(key=0), "a persistent id that is not a storage"),
    "storage with a long name": (view(key="0" * 1000), "a persistent id that is not a storage"),
    "storage within a storage": (view(within=(("1", 0, 3),)), "a persistent id that is not a storage"),
    "storage of functions": (view(kind=OrderedDict), "a persistent id that is not a storage"),
    "storage of complex numbers": (view(kind=torch.ComplexFloatStorage), "would call torch.ComplexFloatStorage"),
}


@pytest.mark.parametrize(("tensor", "about"), TENSORS.values(), ids=TENSORS)
@BOTH
def test_a_tensor_that_does_not_fit_its_file_is_refused(tmp_path: Path, tensor: Call, about: str, zipped: bool):
    assert about in refused(write(tmp_path / "model.bin", zipped, program(tensor))).problem


PROGRAMS = {
    "a memo of 2**32 places": (b"Nr\xff\xff\xff\xff.", "holds a NoneType"),
    "bytes of 10**15": (b"\x8e" + struct.pack("<Q", 10**15) + b".", "bytes8"),
    "mutable bytes of 10**15": (b"\x96" + struct.pack("<Q", 10**15) + b".", "bytearray8"),
    "text of 10**15": (b"\x8d" + struct.pack("<Q", 10**15) + b".", "unicodestring8"),
    "a number of 2**31 bytes": (b"\x8b\xff\xff\xff\x7f.", "long4"),
    "a number of 2000 bytes as a name": (b"}\x8b\xd0\x07\0\0" + b"\x7f" * 2000 + b"Ns.", "unsupported key"),
    "a frame of 10**15": (b"\x95" + struct.pack("<Q", 10**15) + b".", "IndexError"),
    "a key that overflows Python": (b"})" + b"\x85" * 200_000 + b"Ns.", "unsupported key"),
    "a key twice": (b"}(X\1\0\0\0aNX\1\0\0\0aNu.", "with a repeated key"),
    "a key without a value": (b"}(X\1\0\0\0au.", "zip()"),
    "a call of the old kind": (b"(X\1\0\0\0aios\nsystem\n.", "INST os system"),
    "a call by class": (b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
    "a call by a registered number": (b"\x82\1.", "EXT1 1"),
    "a call of a dtype": (b"ctorch\nFloatStorage\n)R.", "TypeError"),
    "a call of a name": (b"X\1\0\0\0a)R.", "TypeError"),
    "a copy of a table": (b"ccollections\nOrderedDict\n}\x85R.", "TypeError"),
    "a function as the object": (b"ccollections\nOrderedDict\n.", "holds a function"),
    "a name in two numbers": (b"K\1K\2\x93.", "TypeError"),
    "a module with a space": (b"X\x05\0\0\0torchX\7\0\0\0float32\x86R.", "IndexError"),
    "an item for a tuple": (b")Na.", "AttributeError"),
    "items for a list": (b"]K\0Ns.", "unsupported key"),
    "nothing to take": (b"\x86.", "needs more values than the stack has"),
    "no mark": (b"Nt.", "IndexError"),
    "a mark above the stack": (b"NN(0t.", "which torch.save does not write"),
    "an empty program": (b".", "IndexError"),
    "an unknown place of the memo": (b"h\1.", "KeyError"),
    "text that is not UTF-8": (b"X\1\0\0\0\xff.", "UnicodeDecodeError"),
    "no end": (b"N", "Error"),
    "an unknown operation": (b"\xfe.", "ValueError"),
    "a reference by text": (b"P0\n.", "PERSID"),
    "a control code in a name": (b"c\x1b[2J\nx\n.", r"would call \x1b[2J.x "),
    "a very long name": (b"c" + b"a" * 5000 + b"\nx\n.", "would call aaaa"),
}


@pytest.mark.parametrize(("operations", "about"), PROGRAMS.values(), ids=PROGRAMS)
@BOTH
def test_a_hostile_program_is_refused_and_takes_no_memory(tmp_path: Path, operations: bytes, about: str, zipped: bool):
    assert about in refused(write(tmp_path / "model.bin", zipped, b"\x80\x02" + operations, {})).problem


def flagged_as_encrypted(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    return path


def claiming(path: Path, packed: int, unpacked: int, moved: int = 0) -> Path:
    """A zip file whose directory and pickle give storage 0 other sizes than it has, or another place."""
    write(path, True, program(view(numbers=unpacked // 4)))
    content = bytearray(path.read_bytes())
    record = content.rindex(b"archive/data/0") - 46
    content[record + 20 : record + 28] = struct.pack("<II", packed, unpacked)
    content[record + 42] += moved
    path.write_bytes(content)
    return path


def tar(path: Path) -> Path:
    with tarfile.open(path, "w:") as archive:
        archive.add(__file__, "storages")
    return path


def content(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


GOOD = program(view())
FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "compressed": (lambda path: write(path, True, GOOD, compression=zipfile.ZIP_DEFLATED), "is compressed or"),
    "encrypted": (lambda path: flagged_as_encrypted(write(path, True, GOOD)), "is compressed or encrypted"),
    "larger than the file": (lambda path: claiming(path, 10**9, 10**9), "data/0 is not inside the file"),
    "of two sizes": (lambda path: claiming(path, 24, 48), "data/0 is not inside the file"),
    "at another place": (lambda path: claiming(path, 24, 24, moved=-4), "data/0 is not inside the file"),
    "big-endian zip": (lambda path: write(path, True, GOOD, byteorder=b"big"), "is big-endian"),
    "big-endian legacy": (lambda path: write(path, False, GOOD, system={"little_endian": False}), "is big-endian"),
    "system unknown": (lambda path: write(path, False, GOOD, system=[1]), "TypeError"),
    "another protocol": (lambda path: write(path, False, GOOD, protocol=1002), "another magic number"),
    "storages by number": (lambda path: write(path, False, GOOD, {7: SIX["0"]}), "its storages are not those"),  # type: ignore
    "another zip": (lambda path: zip_of(path, "a.txt"), "zip archive without"),
    "two checkpoints": (lambda path: zip_of(path, "a/data.pkl", "b/data.pkl"), "zip archive without"),
    "tar": (tar, "is a tar file"),
    "empty": (lambda path: content(path, b""), "damaged, or is not a PyTorch checkpoint"),
    "text": (lambda path: content(path, b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
    "a pickle": (lambda path: content(path, pickle.dumps({"a": 1}, 2)), "is not a PyTorch checkpoint"),
    "two pickles": (lambda path: content(path, pickle.dumps({"a": 1}, 2) * 2), "another magic number"),
    "safetensors": (lambda path: content(path, struct.pack("<Q", 2) + b"{}"), "is not a PyTorch checkpoint"),
    "a folder": (folder, "is not a file"),
    "nothing": (lambda path: path, "is not a file"),
}


def zip_of(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, GOOD)
    return path


@pytest.mark.parametrize(("make", "about"), FILES.values(), ids=FILES)
def test_another_kind_of_file_is_refused_by_name(tmp_path: Path, make: Callable[[Path], Path], about: str):
    path = make(tmp_path / "model.bin")
    with pytest.raises(UserError) as refusal:
        open_torch(path)
    assert str(path) in refusal.value.problem
    assert about in refusal.value.problem


@BOTH
def test_no_more_of_a_pickle_is_read_than_a_checkpoint_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
):
    path = write(tmp_path / "model.bin", zipped, GOOD)
    for module in (torch_files, torch_zip):
        monkeypatch.setattr(module, "MAX_PICKLE", len(GOOD) - 1)
    assert "is damaged" in refused(path).problem


@pytest.mark.parametrize("name", ["table", "turned"])
@BOTH
def test_a_file_that_shrinks_before_it_is_read_is_an_error(tmp_path: Path, name: str, zipped: bool):
    path = saved(shares(), tmp_path, zipped)
    tensor = open_torch(path)[name]
    path.write_bytes(path.read_bytes()[: tensor.offset + 8])
    with pytest.raises(UserError, match="ended while it was read"):
        read(tensor)


# Damage -----------------------------------------------------------------------------------


@BOTH
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, zipped: bool):
    path = saved(shares(), tmp_path, zipped)
    sound = path.read_bytes()
    for size in [*range(0, len(sound), max(1, len(sound) // 150)), *range(len(sound) - 30, len(sound))]:
        path.write_bytes(sound[:size])
        with pytest.raises(UserError, match=r"pytorch_model\.bin"):
            open_torch(path)


@pytest.mark.parametrize("seed", range(3))
@BOTH
def test_a_file_with_other_bytes_gives_an_error_or_tensors_inside_it(tmp_path: Path, seed: int, zipped: bool):
    path = saved(OrderedDict(shares() | {"one": torch.tensor(1.0), "half": count(3).half()}), tmp_path, zipped)
    sound, chance, opened = path.read_bytes(), random.Random(seed), 0
    for _ in range(200):
        damaged = bytearray(sound)
        for _ in range(chance.choice((1, 1, 2, 8))):
            damaged[chance.randrange(len(sound))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        path.write_bytes(damaged)
        try:
            tensors = open_torch(path)
        except UserError:
            continue
        opened += 1
        for tensor in tensors.values():
            strides = tensor.strides if isinstance(tensor, StridedTensor) else None
            reach = spread(tensor.shape, strides) * tensor.dtype.itemsize
            assert 0 <= tensor.offset <= tensor.offset + reach <= len(sound)
            if np.prod(tensor.shape, dtype=object) < 1000:
                read(tensor)
    assert 0 < opened < 200, "these files are all damaged beyond reading, or all sound"


def spread(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> int:
    """How many numbers lie between the first and the last one of a tensor, with both."""
    if strides is None:
        return int(np.prod(shape))
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


# Files of other people --------------------------------------------------------------------


def test_metas_checkpoints_open_as_in_torch(assets: Path):
    files = sorted((assets / "golden" / "meta").rglob("*.pth"))
    assert len(files) == 3
    for path in files:
        true, opened = torch.load(path, weights_only=True), open_torch(path)
        assert list(opened) == list(true)
        for name, tensor in opened.items():
            assert type(tensor) is Tensor
            np.testing.assert_array_equal(read(tensor), true[name].numpy())


def test_objects_of_other_libraries_are_refused_by_name(assets: Path):
    for path in (assets / "golden" / "megatron").rglob("*.pt"):
        with pytest.raises(UserError, match=r"would call (argparse|megatron)\.\S+ when it is opened"):
            open_torch(path)


# Writing ----------------------------------------------------------------------------------


def written(path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state that torch_file planned, a few numbers at a time, as torch reads it."""
    arrays = {name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in state.items()}
    dtypes = {name: torch_tensors.DTYPES[tensor.type()[6:].removesuffix("Tensor")] for name, tensor in state.items()}
    planned = [PlannedTensor(name, tuple(tensor.shape), dtypes[name]) for name, tensor in state.items()]
    whole = (arrays[name].view(dtype) for name, dtype in dtypes.items())
    payloads = [in_pieces(tensor, numbers, 5) for tensor, numbers in zip(planned, whole, strict=True)]
    write_files(path.parent, [torch_file(path.name, payloads)])
    return torch.load(path, weights_only=True)


WRITTEN = {
    "every dtype": lambda: {str(dtype): count(3, 4, dtype=dtype) for dtype in NAMED},
    "every number of axes": lambda: {str(n): count(*range(2, 2 + n)).contiguous() for n in range(6)},
    "nothing": lambda: {"a": torch.empty(0), "b": torch.empty(2, 0, 3), "ü": torch.ones(1)},
    "no tensors": dict,
    "many": lambda: {f"layers.{i}.weight": count(i % 7) for i in range(300)},
}


def spoilt(path: Path, find: Callable[[zipfile.ZipFile], int], value: int = 1) -> None:
    """Flips bits of the byte that `find` finds."""
    with zipfile.ZipFile(path) as archive:
        at = find(archive)
    content = bytearray(path.read_bytes())
    content[at] ^= value
    path.write_bytes(content)


VERSION = "pytorch_model/version"  # which is not read when a file is opened
UNREAD: dict[str, tuple[Callable[[zipfile.ZipFile], int], int]] = {
    "the signature of an entry": (lambda zipped: zipped.getinfo(VERSION).header_offset, 1),
    "the length of an entry's name": (lambda zipped: zipped.getinfo(VERSION).header_offset + 27, 255),
    "the signature of the directory": (lambda zipped: zipped.start_dir, 1),
    "where an entry begins": (lambda zipped: _listed(zipped) + 43, 1),
    "how long an entry is": (lambda zipped: _listed(zipped) + 27, 64),
    "what extracts an entry": (lambda zipped: _listed(zipped) + 6, 255),
}


def _listed(archive: zipfile.ZipFile) -> int:
    """Where the directory tells of VERSION."""
    assert archive.fp is not None
    archive.fp.seek(archive.start_dir)
    return archive.start_dir + archive.fp.read().index(VERSION.encode()) - 46


@pytest.mark.parametrize(("find", "value"), UNREAD.values(), ids=UNREAD)
def test_the_checksums_of_a_damaged_zip_do_not_hold(tmp_path: Path, find: Callable[[zipfile.ZipFile], int], value: int):
    path = saved(shares(), tmp_path, True)
    assert verify_checksums(path) is True
    spoilt(path, find, value)
    assert verify_checksums(path) is False


def test_what_is_compressed_beside_the_tensors_is_passed_over(tmp_path: Path):
    path = saved(shares(), tmp_path, True)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pytorch_model/extra.txt", "once upon a time " * 99)
    assert verify_checksums(path) is True
    spoilt(path, lambda zipped: zipped.start_dir - 20)  # in the text
    assert verify_checksums(path) is True
    spoilt(path, lambda zipped: zipped.getinfo("pytorch_model/data/0").header_offset + 150)
    assert verify_checksums(path) is False


def test_files_too_large_to_be_verified_are_named_from_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = {}
    for i in range(5):
        (tmp_path / f"rank_{i}").mkdir()
        tensors |= {f"{i}": open_torch(saved({"a": count(3)}, tmp_path / f"rank_{i}", True))["a"]}
    assert unverified_note_for(tensors.values()) == ()
    monkeypatch.setattr(torch_files, "CRC_BYTES", 100)
    assert unverified_note_for([tensors["0"]]) == (
        "pytorch_model.bin is larger than 1 GiB: convert --check verifies its checksums",
    )
    assert unverified_note_for(tensors.values()) == (
        "rank_0/pytorch_model.bin, rank_1/pytorch_model.bin, rank_2/pytorch_model.bin and 2 more "
        "are larger than 1 GiB: convert --check verifies their checksums",
    )


@pytest.mark.parametrize("large", [False, True], ids=["small", "in zip64"])
@pytest.mark.parametrize("state", WRITTEN.values(), ids=WRITTEN)
def test_torch_opens_what_is_written(
    tmp_path: Path, state: Callable[[], dict[str, torch.Tensor]], large: bool, monkeypatch: pytest.MonkeyPatch
):
    if large:  # as if these files were beyond what a plain zip file can say
        monkeypatch.setattr(torch_zip, "LIMIT", 20)
    held, path = state(), tmp_path / "consolidated.00.pth"
    for tensors in (written(path, held), torch.load(path, weights_only=True, mmap=True) if held else {}):
        assert list(tensors) == list(held)
        for name, tensor in held.items():
            assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(tensors[name], tensor)
            assert tensors[name].stride() == tensor.stride() or tensor.numel() == 0
    opened = open_torch(path)
    assert list(opened) == list(held)
    for name, tensor in opened.items():
        assert tensor.offset % 64 == 0
        assert read(tensor).tobytes() == held[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    assert [name for name in names if "/data/" not in name] == [
        f"consolidated.00/{name}" for name in ("data.pkl", "byteorder", "version")
    ]


def test_sizes_beyond_32_bits_are_told_as_they_are():
    planned = [PlannedTensor("w", (2**33, 3), np.dtype(np.int8))]
    sizes = [value for _, value, _ in pickletools.genops(dump_pickle(planned)) if isinstance(value, int)]
    assert sizes.count(3 * 2**33) == 1
    assert sizes.count(2**33) == 1


def test_a_tensor_of_fewer_numbers_than_planned_is_noticed(tmp_path: Path):
    few = in_pieces(PlannedTensor("w", (4,), np.dtype(np.float32)), np.ones(3, np.float32), 5)
    with pytest.raises(AssertionError, match="w: 12 bytes written, 16 promised"):
        write_files(tmp_path, [torch_file("model.pth", [few])])


@pytest.mark.parametrize(
    ("value", "names"),
    [({"model": {"a": count(2)}}, ["a"]), ({"a": count(2)}, ["a"]), ({"model": count(2)}, ["model"])],
)
def test_a_table_inside_stands_for_all_where_it_is_alone(tmp_path: Path, value: Any, names: list[str]):
    assert list(open_torch(saved(value, tmp_path, True), "model")) == names
    with pytest.raises(UserError, match="holds more than tensors by name: model"):
        open_torch(saved({"model": {"a": count(2)}, "b": count(2)}, tmp_path, True), "model")
