"""The tar walker against Python's tarfile, and what it refuses."""

import io
import tarfile
import time
from contextlib import suppress

import pytest

from megastar.data.shards.tar_reader import walk
from megastar.errors import UserError


def tar_of(members, format=tarfile.USTAR_FORMAT, **fields) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in fields.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def found(data: bytes) -> list[tuple[str, bytes]]:
    return [(m.name, data[m.start : m.start + m.size]) for m in walk(data, "x.tar")]


NAMES = [("a.cls", b"7"), ("empty.json", b""), ("b/c.npy", bytes(512)), ("d.npy", bytes(range(256)) * 3)]
LONG = [("é" * 60 + ".cls", b"1"), ("deep/" * 40 + "x.npy", b"2"), ("n" * 300 + ".npy", b"3"), ("z.cls", b"4")]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_writes(format):
    members = NAMES + (LONG if format != tarfile.USTAR_FORMAT else [("p" * 90 + "/" + "q" * 90, b"5")])
    assert found(tar_of(members, format)) == members


def test_pax_size_time_and_owner():
    members = [("a.cls", b"12345")]
    assert found(tar_of(members, tarfile.PAX_FORMAT, mtime=1.5, uname="ü", pax_headers={"size": "5"})) == members


def test_directories_are_passed_over():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        folder = tarfile.TarInfo("./folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        member = tarfile.TarInfo("./folder/a.cls")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"3"))
    assert found(out.getvalue()) == [("./folder/a.cls", b"3")]


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (b"S", "a sparse file"),
        (b"Z", "a member of type b'Z'"),
    ],
)
def test_links_and_devices_are_refused(kind, what):
    data = tar_of([("a.npy", b"")], type=kind, linkname="/etc/passwd")
    with pytest.raises(UserError, match=f"x.tar holds {what}, a.npy: store regular files only"):
        found(data)


@pytest.mark.parametrize("name", ["/etc/passwd.cls", "../up.cls", "a/../../b.cls", "..", "a/.."])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_leave_the_folder_are_refused(name, format):
    headers = {"pax_headers": {"path": name}} if format == tarfile.PAX_FORMAT else {}
    with pytest.raises(UserError, match="names must be relative, without '..'"):
        found(tar_of([(name, b"1")], format, **headers))


def test_a_nul_or_endless_name_is_refused():
    for name in ("a\0b.cls", "n" * 5000):
        data = tar_of([("a.cls", b"1")], tarfile.PAX_FORMAT, pax_headers={"path": name})
        with pytest.raises(UserError, match="names must be relative"):
            found(data)


def header(data: bytearray, **fields: bytes) -> bytes:
    """Change fields of the first header and fix its checksum."""
    places = {"size": (124, 12), "type": (156, 1), "name": (0, 100)}
    for key, value in fields.items():
        at, length = places[key]
        data[at : at + length] = value.ljust(length, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (b"77777777777\0", "ends inside a.npy: it was truncated"),
        (b"\x80" + b"\xff" * 11, "ends inside a.npy"),  # GNU's base 256: 2^88
        (b"\xff" * 12, "a broken header at byte 0"),  # a negative one
        (b"-0000000001\0", "a broken header at byte 0"),
        (b"0x10\0", "a broken header at byte 0"),
        (b"9\0", "a broken header at byte 0"),
        ("٣".encode(), "a broken header at byte 0"),
    ],
)
def test_nonsense_sizes(size, message):
    with pytest.raises(UserError, match=message):
        found(header(bytearray(tar_of([("a.npy", b"12")])), size=size))


def test_base_256_sizes_are_read():
    data = header(bytearray(tar_of([("a.npy", b"12")])), size=b"\x80" + (2).to_bytes(11, "big"))
    assert found(data) == [("a.npy", b"12")]


@pytest.mark.parametrize("kind", [b"x", b"g", b"L"])
def test_huge_or_broken_extended_headers(kind):
    data = bytearray(tar_of([("a.npy", bytes(2 << 20))]))
    with pytest.raises(UserError, match="an extended header of 2097152 bytes at byte 0"):
        found(header(data, type=kind))
    if kind == b"L":
        with pytest.raises(UserError, match="a broken header at byte 1024"):  # a name, and nothing that has it
            found(header(bytearray(tar_of([("a.npy", b"name")])), type=kind))
        return
    for body in (b"99 path=x\n", b"-5 a=b\n", b"5", b"0 =\n", b"7 ab=c\n7 ab\n", b"12345678901 a=b\n"):
        with pytest.raises(UserError, match=r"a broken header at byte \d+|end-of-archive marker"):
            found(header(bytearray(tar_of([("a.npy", body)])), type=kind))
    for body in (b"10 size=x\n", b"11 size=-1\n"):
        with pytest.raises(UserError, match="a broken header|a global header"):
            found(header(bytearray(tar_of([("a.npy", body)])), type=kind))


def test_one_size_for_all_members_is_refused():
    with pytest.raises(UserError, match="a global header with a path or size"):
        found(header(bytearray(tar_of([("a.npy", b"10 size=5\n")])), type=b"g"))


def test_flipped_header_bits_are_found():
    data = tar_of(NAMES)
    for at in range(512):
        broken = bytearray(data)
        broken[512 * 2 + at] ^= 0x10  # the second member's header
        if 148 <= at < 156:  # the sum itself: a leading 0 made a blank is the same number
            with suppress(UserError):
                assert found(bytes(broken)) == NAMES
            continue
        with pytest.raises(UserError, match="x.tar has a broken header at byte 1024"):
            found(bytes(broken))


def test_cut_at_any_place():
    data = tar_of(NAMES)
    end = data.rindex(b"\xff") // 512 * 512 + 512  # of the last member; the end mark and its padding follow
    for size in [*range(0, end + 512, 64), end, end + 511]:
        with pytest.raises(UserError, match="it was truncated"):
            found(data[:size])
    assert found(data[: end + 512]) == NAMES  # one block of zeros is a mark; some writers write no more


def test_two_tars_in_one_file_are_refused():
    with pytest.raises(UserError, match="has data after its end-of-archive marker"):
        found(tar_of(NAMES) + tar_of(NAMES))


def test_walking_many_headers_is_fast():
    one = tar_of([("a.npy", b"x")])[:1024]
    data = one * 30_000 + bytes(1024)
    start = time.process_time()
    assert sum(1 for _ in walk(data, "x.tar")) == 30_000
    assert time.process_time() - start < 3  # 0.1 s where nothing else runs: guards against a step that is not constant
