import struct
from pathlib import Path

import numpy as np
import pytest

from camelid.data.config import Source
from camelid.data.readers.megatron_data import index_dtype, open_indexed, write_indexed
from camelid.data.readers.sources import source_files
from camelid.errors import UserError

DOCUMENTS = [[1, 2, 3], [], [65499, 0], [7]]


def index(
    lengths: list[int], pointers: list[int], documents: list[int], *, code: int = 8, version: int = 1, more: bytes = b""
) -> bytes:
    """An .idx file as its description has it, field by field."""
    head = b"MMIDIDX\x00\x00" + struct.pack("<Q", version) + struct.pack("<B", code)
    counts = struct.pack("<Q", len(lengths)) + struct.pack("<Q", len(documents))
    arrays = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(pointers)}q", *pointers)
    return head + counts + arrays + struct.pack(f"<{len(documents)}q", *documents) + more


def save(content: bytes, tokens: bytes = struct.pack("<6H", 1, 2, 3, 65499, 0, 7)) -> None:
    Path("x.idx").write_bytes(content)
    Path("x.bin").write_bytes(tokens)


def read(name: str = "x") -> list[list[int]]:
    data = open_indexed(Path(name))
    return [data.document(number).tolist() for number in range(len(data))]


GOOD = index([3, 0, 2, 1], [0, 6, 6, 10], [0, 1, 2, 3, 4])


def test_what_is_written_is_byte_for_byte_what_the_description_says():
    write_indexed(Path("x"), (np.array(ids, int) for ids in DOCUMENTS), np.dtype("uint16"))
    assert Path("x.idx").read_bytes() == GOOD
    assert Path("x.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 65499, 0, 7)
    assert sorted(file.name for file in Path().iterdir()) == ["x.bin", "x.idx"]
    assert read() == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "code"), [("u1", 1), ("i1", 2), ("i2", 3), ("i4", 4), ("i8", 5), ("u2", 8), (">i4", 4), ("int64", 5)]
)
def test_every_type_of_ids_is_written_and_read(name: str, code: int):
    write_indexed(Path("x"), [np.array([1, 127]), np.array([0])], np.dtype(name))
    size = np.dtype(name).itemsize
    assert Path("x.idx").read_bytes() == index([2, 1], [0, 2 * size], [0, 1, 2], code=code)
    assert read() == [[1, 127], [0]]
    assert open_indexed(Path("x")).document(0).dtype == np.int32


def test_a_document_of_several_sequences_is_one():
    save(index([1, 2, 2, 1], [0, 2, 6, 10], [0, 2, 2, 4]))
    assert read() == [[1, 2, 3], [], [65499, 0, 7]]


def test_sequences_may_lie_in_any_order():
    save(index([2, 3], [6, 0], [0, 1, 2]))
    assert read() == [[65499, 0], [1, 2, 3]]


def test_modes_of_text_are_skipped_and_others_refused():
    save(index([3, 3], [0, 6], [0, 1, 2], more=b"\0\0"))
    assert len(read()) == 2
    save(index([3, 3], [0, 6], [0, 1, 2], more=b"\0\1"))
    with pytest.raises(UserError, match=r"x\.idx has sequences that are not text"):
        read()


def test_a_data_set_without_documents_is_written_and_read():
    write_indexed(Path("d/x"), [], np.dtype("u2"))
    assert Path("d/x.idx").read_bytes() == index([], [], [0])
    assert read("d/x") == []


def test_the_type_of_ids_follows_megatron():
    assert [index_dtype(size).name for size in (65499, 65500, 128256)] == ["uint16", "int32", "int32"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x\.idx is not a Megatron index, or is truncated"),
        (GOOD[:20], r"x\.idx is not a Megatron index, or is truncated"),
        (b"TNTIDX\x00\x00" + GOOD[8:], r"x\.idx is of an older format"),
        (index([6], [0], [0, 1], version=2), r"x\.idx is of version 2"),
        (index([6], [0], [0, 1], code=7), r"x\.bin holds float32"),
        (index([6], [0], [0, 1], code=9), r"x\.bin holds an unknown type, 9"),
        (GOOD[:-1], r"x\.idx has 121 bytes; 4 sequences of 4 documents need 122"),
        (GOOD + b"12345", r"x\.idx has 127 bytes"),
        (index([6], [0], [0, 2]), r"its documents do not cover all sequences"),
        (index([6], [0], [1, 1]), r"its documents do not cover all sequences"),
        (index([6], [0], []), r"its documents do not cover all sequences"),
        (index([3, 3], [0, 6], [0, 2, 1, 2]), r"x\.idx: document 2 is sequences 2 to 1"),
        (index([7], [0], [0, 1]), r"x\.idx: sequence 1 is bytes 0 to 14 of 12"),
        (index([-1], [0], [0, 1]), r"x\.idx: sequence 1 is bytes 0 to -2 of 12"),
        (index([1], [-2], [0, 1]), r"x\.idx: sequence 1 is bytes -2 to 0 of 12"),
    ],
)
def test_a_damaged_index_is_named(content: bytes, message: str):
    save(content)
    with pytest.raises(UserError, match=message):
        read()


def test_ids_that_are_none_are_named():
    for code, tokens, wrong in ((3, struct.pack("<2h", 5, -7), "-7"), (5, struct.pack("<2q", 5, 2**31), "2147483648")):
        save(index([2], [0], [0, 1], code=code), tokens)
        with pytest.raises(UserError, match=rf"x\.bin: document 1 holds {wrong}, which is not a token id"):
            read()


def test_a_missing_half_is_named():
    save(GOOD)
    Path("x.bin").unlink()
    with pytest.raises(UserError, match=r"x\.bin is missing\nMegatron's data is two files, x\.bin and x\.idx"):
        read()


@pytest.mark.parametrize(("gone", "name"), [(".idx", "x.bin"), (".idx", "x"), (".bin", "x.idx"), (".bin", "x*")])
def test_a_source_of_half_a_data_set_names_the_other_half(gone: str, name: str):
    save(GOOD)
    Path(f"x{gone}").unlink()
    with pytest.raises(UserError, match=rf"^x\{gone} is missing\nMegatron's data is two files, x\.bin and x\.idx"):
        source_files(Source(files=(name,), kind="tokens"))


def test_any_cut_or_changed_byte_gives_ids_or_an_error_of_ours():
    generator = np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(GOOD)
        if generator.random() < 0.3:
            content = content[: generator.integers(len(content))]
        else:
            for place in generator.integers(len(content), size=generator.integers(1, 4)):
                content[place] = generator.integers(256)
        save(bytes(content))
        problem = ""
        try:
            found = read()
        except UserError as error:
            found, problem = [], error.problem
        assert all(0 <= token < 2**31 for document in found for token in document)
        assert found or "x." in problem


def test_what_cannot_be_written_is_refused_and_leaves_nothing():
    for documents, dtype, message in (
        ([[1], [70000]], "u2", "x: document 2 holds id 70000, but uint16 goes from 0 to 65535"),
        ([[-1]], "i4", "x: document 1 holds id -1"),
        ([[1]], "f4", "cannot hold float32"),
        ([[1]], "u4", "cannot hold uint32"),
    ):
        with pytest.raises(UserError, match=message):
            write_indexed(Path("x"), map(np.array, documents), np.dtype(dtype))
        assert not list(Path().iterdir())


def test_existing_files_are_not_overwritten_unasked():
    write_indexed(Path("x"), [np.array([1])], np.dtype("u2"))
    with pytest.raises(UserError, match=r"x\.bin exists already"):
        write_indexed(Path("x"), [np.array([2])], np.dtype("u2"))
    assert read() == [[1]]
    write_indexed(Path("x"), [np.array([2])], np.dtype("u2"), overwrite=True)
    assert read() == [[2]]
