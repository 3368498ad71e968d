"""Tar files by their headers: where each member lies, without reading its content, let alone extracting it.

Ours rather than the standard library's reader, which builds an object for every member and takes a file that was cut between
two members for a whole one: tens of millions of members are scanned here, and a cut shard must not pass for a short one.
Formats: POSIX ustar and pax, GNU (long names, sizes from 8 GiB), and the old one without a magic word.
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from vitcli.errors import DataError

__all__ = ["Member", "iter_members", "name_at", "printable"]

BLOCK = 512
END = bytes(BLOCK)
LONGEST_HEADER = 1 << 20  # bytes before a member's content, long names and pax records included; more is damage
LONGEST_NAME = 4096  # characters in a message; Linux allows no longer path
REGULAR = (b"0", b"\0", b"7")
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes
SPARSE = b"GNU.sparse."  # of pax records
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}

ReadAt = Callable[[int, int], bytes]  # (size, position) to bytes, fewer at the end of the file


class Member(NamedTuple):
    """A regular file in a tar file."""

    name: str
    offset: int  # of its content, bytes
    size: int
    head: int  # where its first header begins; reading from there gives its name again


def iter_members(shard: str | os.PathLike[str] | BinaryIO, *, where: str | None = None, start: int = 0) -> Iterator[Member]:
    """Yield the regular files of a tar file in order.

    Args:
        shard: a local path, or a file open for reading that can seek.
        where: what to call it in messages; else its path.
        start: where to begin: 0, or a member's `head`.

    Raises:
        DataError: missing, empty, no tar file, compressed, cut off or damaged; names the file, the place and the member.
    """
    if not isinstance(shard, str | os.PathLike):
        size = shard.seek(0, os.SEEK_END)

        def read_at(size: int, position: int) -> bytes:
            shard.seek(position)
            return shard.read(size)

        yield from read_members(read_at, size, where=where or str(getattr(shard, "name", "shard")), start=start)
        return
    where = where or os.fspath(shard)
    try:
        descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{where}: cannot open this shard: {error.strerror}") from error
    try:
        size = os.fstat(descriptor).st_size
        yield from read_members(lambda size, position: os.pread(descriptor, size, position), size, where=where, start=start)
    except OSError as error:
        raise DataError(f"{where}: cannot read this shard: {error.strerror}") from error
    finally:
        os.close(descriptor)


def read_members(read_at: ReadAt, size: int, *, where: str, start: int = 0) -> Iterator[Member]:
    """Yield the regular files of a tar file of `size` bytes; raise DataError like `iter_members`."""
    if size == 0:
        raise DataError(f"{where}: this shard is empty (0 bytes); write it again, or leave it out")
    position = head = start
    last = "its beginning"  # for messages
    extended: dict[str, bytes] = {}  # what pax and GNU headers say of the member that follows
    while True:
        block = read_at(BLOCK, position)
        if block == END:
            return
        if position == 0 and (len(block) < BLOCK or not sound(block)):
            packed = next((name for magic, name in COMPRESSED.items() if block.startswith(magic)), None)
            hint = (
                f": it is compressed ({packed}); shards must be plain, because members are read at random; unpack it"
                if packed
                else ""
            )
            raise DataError(f"{where}: this is not a tar file{hint}")
        if len(block) < BLOCK:
            raise DataError(
                f"{where}: truncated: the file ends at byte {size:,}, after {last}, without tar's end mark; "
                "copy or write it again"
            )
        try:
            if not sound(block):
                raise ValueError("no header here")
            kind, length = block[156:157], number(block[124:136])
            if kind in (b"L", b"K", b"x", b"g", b"X"):
                if position - head + length > LONGEST_HEADER:
                    raise ValueError(f"headers of {position - head + length:,} bytes")
                content = read_at(length, position + BLOCK)
                if len(content) < length:
                    raise DataError(
                        f"{where}: truncated: the file ends at byte {size:,}, in a header after {last}; copy or write it again"
                    )
                if kind == b"L":
                    extended["path"] = content.partition(b"\0")[0]
                elif kind in (b"x", b"X"):
                    extended.update(kept_records(content))
                position += BLOCK + padded(length)
                continue
            if kind == b"S" or any(key.startswith(SPARSE.decode()) for key in extended):
                raise ValueError("a sparse file, which is not supported")
            if "size" in extended:
                length = decimal(extended["size"])
        except ValueError as error:
            raise DataError(f"{where}: damaged at byte {position:,}, after {last}: {error}; copy or write it again") from error
        name = member_name(block, extended)
        offset = position + BLOCK
        stored = 0 if kind in WITHOUT_CONTENT else length
        if offset + stored > size:
            raise DataError(
                f"{where}:{printable(name)}: truncated: the member ends at byte {offset + stored:,}, the file at {size:,}; "
                "copy or write the shard again"
            )
        if kind in REGULAR and not name.endswith("/"):  # the oldest format tells a folder by its name
            yield Member(name, offset, length, head)
        last = printable(name)
        position = head = offset + padded(stored)
        extended = {}


def sound(block: bytes) -> bool:
    """Tell whether the checksum of a header is right."""
    try:
        stored = number(block[148:156])
    except ValueError:
        return False
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")  # the checksum itself counts as blanks
    if stored == total:
        return True
    return stored == total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])  # some old ones add signed bytes


def number(field: bytes) -> int:
    """Read a number: octal digits, or GNU's binary form for what these cannot hold."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if digits and not digits.isdigit():  # int() would take signs and underscores
        raise ValueError(f"no number in a header, but {digits!r}")
    return int(digits, 8) if digits else 0


def decimal(digits: bytes) -> int:
    """Read a number of a pax record: digits only, so never a negative one, which would lead back into what has been read."""
    if not digits.isdigit() or len(digits) > 19:
        raise ValueError(f"no number in pax records, but {digits[:20]!r}")
    return int(digits)


def padded(length: int) -> int:
    """Round up to whole blocks."""
    return -(-length // BLOCK) * BLOCK


def kept_records(content: bytes) -> dict[str, bytes]:
    """Read `LENGTH key=value` lines; return those that say where a member lies."""
    records: dict[str, bytes] = {}
    position = 0
    while position < len(content) and content[position]:
        digits, _, _ = content[position : position + 20].partition(b" ")
        length = decimal(digits)
        if length <= len(digits) + 1:
            raise ValueError("damaged pax records")
        key, _, value = content[position + len(digits) + 1 : position + length - 1].partition(b"=")
        if key in (b"path", b"size") or key.startswith(SPARSE):
            records[key.decode("ascii", "replace")] = value
        position += length
    return records


def member_name(block: bytes, extended: dict[str, bytes]) -> str:
    if "path" in extended:
        raw = extended["path"]
    else:
        raw = block[:100].partition(b"\0")[0]
        if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
            raw = prefix + b"/" + raw
    return raw.decode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    """Return a name that keeps a message on one line, whatever it holds."""
    name = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."
    return name if name.isprintable() else repr(name)[1:-1]


def name_at(descriptor: int, head: int) -> str:
    """Return the name of the member whose headers begin at byte `head` of an open tar file, in a form that suits a message."""
    block = os.pread(descriptor, BLOCK, head)
    if len(block) == BLOCK and block[156:157] in REGULAR and block[0]:  # the usual case; loaders ask for every image
        return printable(member_name(block, {}))
    try:
        members = read_members(lambda size, position: os.pread(descriptor, size, position), sys.maxsize, where="", start=head)
        return printable(next(members).name)
    except (DataError, StopIteration, OSError):
        return f"byte {head:,}"
