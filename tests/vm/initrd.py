"""The first file system of a machine: loads what the disks need, mounts the root and goes there."""

import lzma
from pathlib import Path

_MODULES = ("virtio_pci", "virtio_blk")
_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /new
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules); do /bin/busybox insmod $module; done
until /bin/busybox mount -t ext4 /dev/vda /new 2>/dev/null; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 -o ro /dev/vdb /new/opt/incfs
/bin/busybox umount /dev
exec /bin/busybox switch_root /new /sbin/init
"""
_DIRECTORY, _PROGRAM, _FILE = 0o040755, 0o100755, 0o100644


def make_initrd(modules: Path, busybox: Path) -> bytes:
    """Return the archive for the kernel whose modules are in ``modules`` (``lib/modules/RELEASE``, after depmod)."""
    needed = _in_order(modules)
    names = [f"lib/{Path(path).name.removesuffix('.xz')}" for path in needed]
    entries = [("bin", _DIRECTORY, b""), ("lib", _DIRECTORY, b""), ("init", _PROGRAM, _INIT.encode())]
    entries.append(("bin/busybox", _PROGRAM, busybox.read_bytes()))
    entries += [(name, _FILE, _unpacked(modules / path)) for name, path in zip(names, needed, strict=True)]
    entries.append(("modules", _FILE, "\n".join(f"/{name}" for name in names).encode()))
    return b"".join(_entry(*entry) for entry in [*entries, ("TRAILER!!!", 0, b"")])


def _in_order(modules: Path) -> list[str]:
    """Return the files of the modules that are not built in, each after those that it needs."""
    lines = [line.split(":") for line in (modules / "modules.dep").read_text().splitlines()]
    needs = {path: needed.split() for path, needed in lines}
    by_name = {Path(path).name.split(".")[0].replace("-", "_"): path for path in needs}
    ordered: list[str] = []
    for name in _MODULES:
        if path := by_name.get(name):
            ordered += [p for p in [*reversed(needs[path]), path] if p not in ordered]
    return ordered


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def _entry(name: str, mode: int, content: bytes) -> bytes:
    """Return one entry in the newc format of cpio."""
    encoded = name.encode() + b"\0"
    fields = [0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0]
    head = b"070701" + "".join(f"{field:08X}" for field in fields).encode() + encoded
    return _padded(head) + _padded(content)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)
