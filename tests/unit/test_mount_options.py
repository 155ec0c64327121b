"""Mount options and the mount table."""

from pathlib import Path

import pytest

from incfs.errors import UsageError
from incfs.mount import fuse_options
from incfs.mount_options import MountOptions, parse_options
from incfs.mount_table import parse_mount


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


def test_a_line_of_the_mount_table():
    line = rb"36 35 0:52 / /mnt/a\040b rw,nosuid shared:1 - fuse.incfs /pools/x\134y rw,user_id=0"
    mounted = parse_mount(line)
    assert mounted.mountpoint == Path("/mnt/a b")
    assert (mounted.filesystem_type, mounted.source) == ("fuse.incfs", "/pools/x\\y")
    assert mounted.device == "0:52"
