"""Mount options and the mount table."""

from pathlib import Path

import pytest

from incfs.errors import UsageError
from incfs.mount import fuse_options, why_refused
from incfs.mount_options import MountOptions, parse_options
from incfs.mount_table import parse_mount, parse_mounts, resolve_mountpoint
from incfs.namespaces import Namespace, staying


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", MountOptions()),
        ("rw,dev,suid,nofail,_netdev,x-systemd.automount,X-mount.mkdir,user=me", MountOptions()),
        ("cache=none,allow_other", MountOptions(cache="none", allow_other=True)),
        ("cache=none,cache=writeback", MountOptions(cache="writeback")),
        ("ro", MountOptions(read_only=True)),
        ("ro,rw", MountOptions()),
        ("hooks,metrics=9100", MountOptions(hooks=True, metrics="9100")),
        ("metrics=/run/m.sock", MountOptions(metrics="/run/m.sock")),
        ("commit=0.5,fsname=pool,noatime", MountOptions(commit_s=0.5, source="pool", kernel=("noatime",))),
    ],
)
def test_what_options_mean(text, expected):
    assert parse_options(text) == expected


@pytest.mark.parametrize(
    "option",
    [
        "cahce=none",
        "cache",
        "cache=fast",
        "commit",
        "commit=x",
        "commit=0",
        "commit=nan",
        "allow_other=1",
        "fsname",
        "hooks=no",
        "metrics",
        "metrics=0",
        "metrics=65536",
        "metrics=run/m.sock",
        "metrics=0.0.0.0:80",
    ],
)
def test_what_makes_no_sense_is_named(option):
    with pytest.raises(UsageError) as raised:
        parse_options(f"rw,{option}")
    assert repr(option) in str(raised.value)


def test_what_libfuse_is_told():
    told = fuse_options(Path("/pools/a,b\\c é"), MountOptions(allow_other=True, read_only=True, kernel=("noatime",)))
    assert told == {
        "default_permissions",
        "fsname=/pools/a\\,b\\\\c %C3%A9",
        "subtype=incfs",
        "allow_other",
        "ro",
        "noatime",
    }


def test_why_libfuse_may_have_refused(tmp_path, monkeypatch):
    assert "modprobe" in why_refused(MountOptions(), tmp_path / "fuse")
    (tmp_path / "fuse").touch()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "user_allow_other" in why_refused(MountOptions(allow_other=True), tmp_path / "fuse")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "may not open" in why_refused(MountOptions(allow_other=True), tmp_path / "fuse")


def test_a_line_of_the_mount_table():
    line = rb"36 35 0:52 / /mnt/a\040b rw,nosuid shared:1 - fuse.incfs /pools/x\134y rw,user_id=0"
    mounted = parse_mount(line)
    assert mounted.mountpoint == Path("/mnt/a b")
    assert (mounted.filesystem_type, mounted.source) == ("fuse.incfs", "/pools/x\\y")
    assert mounted.device == "0:52"
    assert (mounted.id, mounted.parent_id, mounted.root, mounted.shared, mounted.master) == (36, 35, "/", 1, 0)


def table(text):
    """Make a mount table of lines ``ID PARENT DEVICE ROOT PLACE [shared:N|master:N]...``."""
    fields = filter(None, map(str.split, text.splitlines()))
    lines = [" ".join([*line[:5], "rw", *line[5:], "-", "fuse.incfs", "p", "rw"]) for line in fields]
    return tuple(parse_mounts("\n".join(lines).encode()))


OURS = """
    1 0 8:1 / / shared:1
    9 1 0:9 / /mnt/p shared:5
"""


@pytest.mark.parametrize(
    ("other", "places"),
    [
        # What systemd gives most services: their root follows ours, so their copy goes with ours.
        ("11 0 8:1 / / master:1\n 19 11 0:9 / /mnt/p master:5", []),
        ("11 0 8:1 / / shared:2 master:1\n 19 11 0:9 / /mnt/p shared:6", []),
        ("11 0 8:1 / / shared:1\n 19 11 0:9 / /mnt/p", []),
        # Their root is another directory of the same filesystem: the place in it counts, not the path.
        ("11 0 8:1 /mnt / master:1\n 19 11 0:9 / /p", []),
        ("11 0 8:1 /mnt / master:1\n 19 11 0:9 / /mnt/p", ["/mnt/p"]),
        # A private copy, a container's volume, a root of its own whose parent nobody sees.
        ("11 0 8:1 / /\n 19 11 0:9 / /mnt/p", ["/mnt/p"]),
        ("11 0 7:7 / /\n 19 11 0:9 /v /data", ["/data"]),
        ("19 18 0:9 / /", ["/"]),
        ("11 0 8:1 / / master:1\n 19 11 0:9 / /elsewhere", ["/elsewhere"]),
        # A slave of a slave hears of it; a slave of something else does not.
        ("11 0 8:1 / / shared:2 master:1\n 12 0 8:1 / / master:2\n 19 12 0:9 / /mnt/p", []),
        ("11 0 8:1 / / master:7\n 19 11 0:9 / /mnt/p", ["/mnt/p"]),
    ],
)
def test_what_an_unmounting_does_not_reach(other, places):
    ours = Namespace(0, table(OURS))
    found = staying(ours.mounts[1], [ours, Namespace(7, table(other))])
    assert [str(mounted.mountpoint) for _, mounted in found] == places


def test_a_mount_point_is_found_through_links_without_asking_the_mount(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mnt").mkdir()
    (tmp_path / "link").symlink_to("a/mnt")
    (tmp_path / "again").symlink_to(tmp_path / "link")
    (tmp_path / "up").symlink_to("a/mnt/..")
    for name, place in {"a/mnt": "a/mnt", "link": "a/mnt", "again": "a/mnt", "up": "a", "missing": "missing"}.items():
        assert resolve_mountpoint(tmp_path / name) == tmp_path / place
