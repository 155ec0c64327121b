"""Files that are no raw images although somebody may take them for one: known by their magic.

A raw image has no magic, and a guest can write any at the start of its disk: so what is found here is refused, never
followed, and whoever knows better says ``--format raw``.
"""

import shlex
from pathlib import Path
from typing import Final

from incfs.errors import NotSupported, UsageError
from incfs.rawsource import RawSource
from incfs.stream.frames import MAGIC as STREAM_MAGIC

RAW: Final = "raw"
AUTO: Final = "auto"
IMAGES: Final = {"qcow2": "qcow2", "vmdk": "VMDK", "vpc": "VHD", "vhdx": "VHDX", "vdi": "VDI"}
"""Disk images, as qemu-img calls them and as people do."""
_ALIASES: Final = {"vhd": "vpc"}
_HEAD_BYTES: Final = 512
_FOOTER_BYTES: Final = 512
_HEADS: Final = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, STREAM_MAGIC, "stream"),
    (0, b"\x1f\x8b\x08", "gzip"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"BZh", "bzip2"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
)
_BZIP2_BLOCK: Final = b"1AY&SY"
_VHD_FOOTER: Final = b"conectix"


def parse_format(text: str) -> str:
    """Read the name of an image's format, ``auto`` and ``raw`` among them.

    Raises:
        UsageError: It is none that is known.
    """
    name = text.strip().lower()
    name = _ALIASES.get(name, name)
    if name not in (RAW, AUTO, *IMAGES):
        raise UsageError(f"no image format {text!r}; there are: {', '.join((RAW, *IMAGES, AUTO))}")
    return name


def recognise(source: RawSource) -> str | None:
    """Name the format that a file's magic tells; None where nothing speaks against a raw image."""
    head = source.read(0, min(_HEAD_BYTES, source.size_bytes))
    for offset, magic, name in _HEADS:
        if head.startswith(magic, offset) and (name != "bzip2" or head[4:10] == _BZIP2_BLOCK):
            return name
    # A VHD of fixed size is a raw image with a footer.
    if source.size_bytes > _FOOTER_BYTES and source.read(
        source.size_bytes - _FOOTER_BYTES, len(_VHD_FOOTER)
    ) == _VHD_FOOTER:  # fmt: skip
        return "vpc"
    return None


def require_raw(source: RawSource, volume: str, *, can_convert: bool) -> None:
    """Refuse what is no raw image, with the line that makes one of it.

    Args:
        source: The file.
        volume: What the volume is to be called.
        can_convert: Whether the command takes other formats, when it is told.

    Raises:
        NotSupported: It is recognised as something else.
    """
    found = recognise(source)
    if found is not None:
        raise NotSupported(
            f"{source.path} is {_name(found)}, not a raw image: {_way(found, source.path, volume, can_convert)}; "
            f"--format raw takes its bytes as they are",
            path=str(source.path),
            format=found,
        )


def _name(found: str) -> str:
    if found == "stream":
        return "an incfs stream"
    return f"a {IMAGES[found]} image" if found in IMAGES else f"a file packed by {found}"


def _way(found: str, path: Path, volume: str, can_convert: bool) -> str:
    here, raw, name = (shlex.quote(text) for text in (str(path), str(path.with_suffix(".raw")), volume))
    if found == "stream":
        return f"`incfs receive {name} < {here}`"
    if found not in IMAGES:
        return f"`{found} -dc {here} > {raw}` unpacks it"
    convert = f"`qemu-img convert -f {found} -O raw {here} {raw}` makes one"
    return f"--format {found} reads it, or {convert}" if can_convert else convert
