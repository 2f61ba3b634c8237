"""The bytes of text files: decompressed, and as UTF-8."""

import codecs
import gzip
import io
import re
from pathlib import Path
from typing import Any

from camelid.errors import UserError
from camelid.extras import install_hint
from camelid.inputs import encoding_of

COMPRESSED = re.compile(r"\.(gz|zst)$", re.IGNORECASE)


def open_stream(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Opens a file for reading, decompressed; text with a byte-order mark of UTF-16 or UTF-32 is converted to UTF-8."""
    stream = _decompressed(path)
    try:
        encoding = encoding_of(stream.peek(4)[:4])
    except BaseException:
        stream.close()
        raise
    return stream if encoding.startswith("utf-8") else io.BufferedReader(_Recoded(stream, encoding, path))


def is_sequential(path: Path) -> bool:
    """Whether a file can only be read from its beginning, because it is compressed, or in UTF-16 or UTF-32."""
    if COMPRESSED.search(path.name):
        return True
    with path.open("rb") as file:
        return not encoding_of(file.read(4)).startswith("utf-8")


def _decompressed(path: Path) -> gzip.GzipFile | io.BufferedReader:
    match path.suffix.lower():
        case ".gz":
            return gzip.GzipFile(path)
        case ".zst":
            return io.BufferedReader(_Zstandard(path))
    return path.open("rb")


class _Recoded(io.RawIOBase):
    """A stream of text in UTF-16 or UTF-32, converted to UTF-8."""

    def __init__(self, stream: io.BufferedIOBase, encoding: str, path: Path):
        self._stream, self._encoding, self._path = stream, encoding, path
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready, self._ended = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            data = self._stream.read(io.DEFAULT_BUFFER_SIZE)
            self._ended = not data
            try:
                self._ready = self._decoder.decode(data, final=self._ended).encode()
            except UnicodeError as error:
                raise UserError(f"{self._path}: not {self._encoding} ({error})", "Save it as UTF-8.") from error
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Zstandard(io.RawIOBase):
    """A decompressed .zst file. Unlike the reader of the library, it raises EOFError if the file is truncated."""

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(f"{path} needs zstandard: {error}", install_hint("data")) from error
        # Files written by `zstd --long=31` need a window of this size; the memory for it is used by such files only.
        self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._error = zstandard.ZstdError
        self._path, self._file = path, path.open("rb")
        self._object = None
        self._ready, self._left = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            # A kilobyte can decompress to 32 megabytes, so no more is read at once.
            packed = self._left or self._file.read(1024)
            self._left = b""
            if not packed and self._object is None:
                return 0
            if not packed:
                raise EOFError("it is truncated")
            self._object = self._object or self._frame()
            try:
                self._ready = self._object.decompress(packed)
            except self._error as error:
                raise OSError(str(error)) from error
            if self._object.eof:
                self._left, self._object = self._object.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
