"""The zip archives that ``torch.save`` and ``torch.jit.save`` write, or that another tool wrote again.

Offsets are read from each member's own header. What could be read in two ways is refused: a name that stands twice,
members that overlap, bytes before the archive; and what cannot be read at an offset: compression, encryption.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass

from dexport.errors import InputError
from dexport.exporter.weights.file import CheckpointFile

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
END, END_64, LOCATOR_64_SIZE = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), 20
IN_END_64 = 0xFFFFFFFF
LOCAL_MAGIC = b"PK\x03\x04"
ENCRYPTED, UTF_8 = 0x1 | 0x40, 0x800
WRITE_AGAIN = "write it again: torch.save(torch.load(FILE, weights_only=True), 'again.pt')"


@dataclass(frozen=True)
class Member:
    """One file of an archive: where its bytes lie."""

    name: str
    offset: int
    size: int
    stored: bool


class ZipArchive:
    """The members of an archive by their name below its one folder, in lower case: so PyTorch looks them up.

    Raises:
        InputError: no archive, or one that could be read in two ways.
    """

    def __init__(self, file: CheckpointFile) -> None:
        self.file = file
        try:
            with zipfile.ZipFile(_Reader(file)) as archive:
                infos, directory, comment = archive.infolist(), archive.start_dir, archive.comment
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError) as error:
            raise InputError(
                f"{file.path} is not a whole PyTorch checkpoint: {error}", hint="copy or download it again"
            ) from error
        self._check_end(directory, comment)
        # PyTorch takes the folder of the first member.
        self.root, slash, _ = infos[0].filename.partition("/") if infos else ("", "", "")
        if not slash:
            raise self._refused("its first member lies in no folder")
        self.members: dict[str, Member] = {}
        spans = []
        for info in infos:
            member, start = self._locate(info)
            spans.append((start, member.offset + member.size, info.filename))
            folder, _, name = info.filename.partition("/")
            if folder.lower() != self.root.lower():
                if name.lower() == "data.pkl":
                    raise self._refused("it holds two indexes (data.pkl)")
                continue
            if name.lower() in self.members:
                raise self._refused(f"its member {name} stands in it twice")
            self.members[name.lower()] = member
        self._check_spans(spans, directory)

    def find(self, name: str) -> Member | None:
        """The member, None where there is none.

        Raises:
            InputError: it is compressed.
        """
        member = self.members.get(name.lower())
        if member is not None and not member.stored:
            raise self._refused(f"its member {name} is compressed, and torch.save compresses nothing")
        return member

    def read(self, name: str, limit: int) -> bytes | None:
        """The bytes of a small member, None where there is none.

        Raises:
            InputError: it is compressed, or longer than ``limit``.
        """
        member = self.find(name)
        if member is None:
            return None
        if member.size > limit:
            raise self._refused(f"its member {name} has {member.size} bytes, and {limit} is the most")
        return self.file.read_at(member.offset, member.size).tobytes()

    def unpacked(self, member: Member, limit: int) -> bytes:
        """The text of a member, which may be compressed.

        Raises:
            InputError: it is longer than ``limit``, or damaged.
        """
        if member.size > limit:
            raise self._refused(f"its member {member.name} is too long")
        data = self.file.read_at(member.offset, member.size).tobytes()
        try:
            text = data if member.stored else zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, limit + 1)
        except zlib.error as error:
            raise self._refused(f"its member {member.name} is damaged") from error
        if len(text) > limit:
            raise self._refused(f"its member {member.name} is too long")
        return text

    def _locate(self, info: zipfile.ZipInfo) -> tuple[Member, int]:
        header = self.file.bytes_at(info.header_offset, LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or info.orig_filename != info.filename:
            raise self._refused("a member has no header or no proper name")
        magic, _, flags, method, *_, name_size, extra_size = LOCAL_HEADER.unpack(header)
        name = self.file.bytes_at(info.header_offset + LOCAL_HEADER.size, name_size)
        expected = info.filename.encode("utf-8" if info.flag_bits & UTF_8 else "cp437", "replace")
        if magic != LOCAL_MAGIC or name != expected or method != info.compress_type:
            raise self._refused(f"the member {info.filename} is another one in its own header than in the directory")
        if (flags | info.flag_bits) & ENCRYPTED:
            raise self._refused(f"its member {info.filename} is encrypted")
        stored = method == zipfile.ZIP_STORED
        if stored and info.file_size != info.compress_size:
            raise self._refused(f"its member {info.filename} has two sizes")
        offset = info.header_offset + LOCAL_HEADER.size + name_size + extra_size
        return Member(info.filename, offset, info.compress_size, stored), info.header_offset

    def _check_spans(self, spans: list[tuple[int, int, str]], directory: int) -> None:
        end, previous = 0, ""
        for start, stop, name in sorted(spans):
            if start < end:
                raise self._refused(f"its members {previous} and {name} overlap")
            end, previous = stop, name
        if end > directory:
            raise self._refused(f"its member {previous} reaches into the directory")

    def _check_end(self, directory: int, comment: bytes) -> None:
        """The directory must lie where the archive says, counted from the first byte, and nothing after its end."""
        at = self.file.size - END.size - len(comment)
        end = self.file.bytes_at(at, END.size)
        if len(end) < END.size or not end.startswith(b"PK\x05\x06"):
            raise self._refused("bytes follow the archive")
        said = END.unpack(end)[6]
        if said == IN_END_64:
            end_64 = self.file.bytes_at(at - LOCATOR_64_SIZE - END_64.size, END_64.size)
            said = END_64.unpack(end_64)[9] if end_64.startswith(b"PK\x06\x06") else -1
        if said != directory:
            raise self._refused("its directory does not lie where it says; bytes were put before the archive")

    def _refused(self, reason: str) -> InputError:
        return InputError(f"{self.file.path} cannot be read without doubt: {reason}", hint=WRITE_AGAIN)


class _Reader:
    """What ``zipfile`` needs of a file, at the offsets of an open one."""

    def __init__(self, file: CheckpointFile) -> None:
        self._file = file
        self._at = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        at = (0, self._at, self._file.size)[whence] + offset
        if at < 0:
            raise OSError("before the start")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        rest = max(self._file.size - self._at, 0)
        data = self._file.bytes_at(self._at, rest if size < 0 else min(size, rest))
        self._at += len(data)
        return data
