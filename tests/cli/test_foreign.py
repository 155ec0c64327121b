"""Images of other formats: refused where a raw one is meant, read and written where they are named."""

import bz2
import gzip
import hashlib
import lzma
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import zstandard

from incfs.errors import NotSupported
from incfs.foreign import recognise, require_raw
from incfs.qemu import QemuTarget
from incfs.rawsource import RawSource
from incfs.stream.frames import make_preamble
from tests.support.cli import Cli, InProcessCli

MIB = 1 << 20
FORMATS = ("qcow2", "vmdk", "vpc", "vhdx", "vdi")


@pytest.fixture
def alone(offline: Cli, capsys: pytest.CaptureFixture[str]) -> Cli:
    """A pool that nobody has open, and commands in this process: what is tested here knows no daemon."""
    assert offline.pool is not None
    return InProcessCli(offline.pool, capsys)


def raw_image(path: Path) -> bytes:
    """8 MiB, most of it a hole."""
    data = bytearray(8 * MIB)
    for start in (0, 3 * MIB + 512, 8 * MIB - 4096):
        data[start : start + 4096] = Random(start).randbytes(4096)
    path.write_bytes(data)
    return bytes(data)


def convert(source: Path, target: Path, image_format: str, *options: str) -> Path:
    """Make an image of another format with the program of others."""
    command = ["qemu-img", "convert", "-q", "-f", "raw", "-O", image_format, *options, str(source), str(target)]
    subprocess.run(command, check=True)
    return target


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": zstandard.compress,
    "lz4": lambda data: b"\x04\x22\x4d\x18" + data[:100],
}


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_image_of_another_format_is_refused_and_read_when_it_is_named(
    alone: Cli, tmp_path: Path, image_format: str
) -> None:
    source, target = tmp_path / "disk.img", tmp_path / "out.img"
    data = raw_image(source)
    options = ("-o", "force_size=on") if image_format == "vpc" else ()
    foreign = convert(source, tmp_path / f"a disk.{image_format}", image_format, *options)
    error = alone.fails(2, "import", "db", foreign)
    assert f"--format {image_format} reads it" in error
    assert f"qemu-img convert -f {image_format} -O raw '{foreign}'" in error
    assert f"-f {image_format} " in alone.fails(2, "volume", "create", "db", "--origin", foreign)
    assert alone.json("volume", "list")["volumes"] == []
    made = alone.json("import", "db", foreign, "--format", "auto")["volume"]
    assert made["size_bytes"] == len(data)
    assert made["mapped_bytes"] <= 4 * 4096
    alone.ok("export", "db", target)
    assert target.read_bytes() == data
    alone.ok("export", "db", tmp_path / "again", "--format", image_format)
    assert "--force" in alone.fails(1, "export", "db", tmp_path / "again", "--format", image_format)
    alone.ok("export", "db", tmp_path / "again", "--format", image_format, "--force")
    compare = ["qemu-img", "compare", "-q", "-f", "raw", "-F", image_format, str(source), str(tmp_path / "again")]
    subprocess.run(compare, check=True)
    assert (tmp_path / "again").stat().st_blocks * 512 < 4 * MIB
    assert not list(tmp_path.glob("*.partial"))


def test_a_named_format_brings_a_volume_up_to_date(cli: Cli, tmp_path: Path) -> None:
    source, target = tmp_path / "disk.img", tmp_path / "out.img"
    data = bytearray(raw_image(source))
    foreign = convert(source, tmp_path / "disk.qcow2", "qcow2", "-c")
    cli.ok("import", "db", foreign, "--format", "qcow2", "--snapshot", "a")
    data[5 * MIB : 5 * MIB + 3] = b"new"
    source.write_bytes(data)
    convert(source, foreign, "qcow2")
    assert "--format qcow2" in cli.fails(2, "import", "db", foreign, "--incremental")
    cli.ok("import", "db", foreign, "--format", "qcow2", "--incremental", "--snapshot", "b")
    assert cli.json("snapshot", "diff", "--from", "a", "db@b")["changed_bytes"] == 4096
    cli.ok("export", "db@b", target)
    assert target.read_bytes() == data
    assert "brought up to date" in cli.fails(
        2, "export", "db@b", target, "--format", "qcow2", "--incremental", "--from", "a"
    )
    assert "no image format" in cli.fails(2, "import", "x", foreign, "--format", "qed")
    assert "fails" in cli.fails(1, "import", "x", source, "--format", "qcow2")
    assert [volume["name"] for volume in cli.json("volume", "list")["volumes"]] == ["db"]
    assert cli.ok("pool", "check", "--data").startswith("clean")


@pytest.mark.parametrize("program", PACKED)
def test_a_packed_file_is_refused_with_what_unpacks_it(alone: Cli, tmp_path: Path, program: str) -> None:
    packed = tmp_path / "disk.img.packed"
    packed.write_bytes(PACKED[program](bytes(range(256)) * 64))
    for image_format in ((), ("--format", "auto")):
        error = alone.fails(2, "import", "db", packed, *image_format)
        assert f"`{program} -dc {packed} > {tmp_path}/disk.img.raw`" in error
    alone.ok("import", "db", packed, "--format", "raw")
    alone.ok("export", "db", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == packed.read_bytes()


def test_a_stream_is_refused_with_what_receives_it(alone: Cli, tmp_path: Path) -> None:
    stream = tmp_path / "db.stream"
    stream.write_bytes(make_preamble() + bytes(4096))
    error = alone.fails(2, "import", "copy", stream)
    assert f"`incfs receive copy < {stream}`" in error
    assert "incfs stream" in alone.fails(2, "volume", "create", "copy", "--origin", stream)
    # Whoever insists gets the bytes.
    alone.ok("volume", "create", "copy", "--origin", stream, "--format", "raw")
    assert "--format raw" in alone.fails(2, "volume", "create", "x", "1M", "--format", "raw")
    assert "--format raw" in alone.fails(2, "volume", "create", "x", "--origin", stream, "--format", "qcow2")


def test_no_other_file_is_opened_for_an_image(alone: Cli, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"a secret" * 8192)
    overlay, data, flat = tmp_path / "overlay.qcow2", tmp_path / "data.qcow2", tmp_path / "flat.vmdk"
    create = ["qemu-img", "create", "-q", "-f"]
    subprocess.run([*create, "qcow2", "-F", "raw", "-b", secret, overlay], check=True)
    subprocess.run(
        [*create, "qcow2", "-o", f"data_file={tmp_path}/elsewhere,data_file_raw=on", data, "64K"], check=True
    )
    flat.write_text(
        '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        f'RW 128 FLAT "{secret}" 0\nddb.adapterType = "ide"\n'
    )
    for path, words in ((overlay, "lies over"), (data, "keeps its data in"), (flat, "not beside it")):
        assert words in alone.fails(2, "import", "db", path, "--format", "auto"), path
    assert alone.json("volume", "list")["volumes"] == []


def test_an_export_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"what was there")
    target = QemuTarget(path, "qcow2", force=True)
    target._scratch.write_bytes(b"half of it")
    target.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["disk.qcow2"]
    assert path.read_bytes() == b"what was there"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotSupported, match="qemu-nbd is not installed"):
        QemuTarget(path, "qcow2", force=True)


def test_an_image_of_the_pool_is_never_replaced(alone: Cli) -> None:
    alone.ok("volume", "create", "db", "1M")
    image = Path(alone.json("storage", "list")["storages"][0]["path"])
    before = image.stat().st_ino
    assert "belongs to this pool" in alone.fails(11, "export", "db", image, "--force", "--format", "qcow2")
    assert image.stat().st_ino == before


def test_an_export_to_stdout_is_the_bytes(alone: Cli, tmp_path: Path) -> None:
    source = tmp_path / "disk.img"
    data = raw_image(source)[:-100]
    source.write_bytes(data)
    alone.ok("import", "db", source)
    done = subprocess.run(alone.command("export", "db", "-"), capture_output=True, check=True)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()
    assert done.stderr == b""
    assert len(alone.json("snapshot", "list")["snapshots"]) == 1
    alone.fails(2, "export", "db", "-", "--json")
    alone.fails(2, "export", "db", "-", "--format", "qcow2")


def test_raw_images_are_recognised_as_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    for content in (b"", b"Q", bytes(512), b"BZh9" + bytes(508), bytes(511) + b"conectix"):
        path.write_bytes(content)
        source = RawSource(path)
        try:
            assert recognise(source) is None
            require_raw(source, "db", can_convert=True)
        finally:
            source.close()
