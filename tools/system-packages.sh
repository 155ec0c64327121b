#!/bin/sh
# Installs the system packages that are lacking, and touches nothing when none is.
#   usage: system-packages.sh setup|demo|test|bench|vm PYTHON
# Each line of the lists below is "Debian package|command that succeeds when it is there", so that
# the check also holds on machines that have the same thing from elsewhere.
set -eu
# mkfs, losetup and blkid live in sbin, which is not on every user's path.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
kind=$1
python=$2
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

list_setup() {
    cat <<EOF
gcc|command -v gcc
libc6-dev|test -e /usr/include/stdlib.h
pkg-config|command -v pkg-config
libfuse3-dev|pkg-config --exists fuse3
fuse3|command -v fusermount3
python$version-dev|"$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'
python$version-venv|"$python" -c 'import venv, ensurepip'
EOF
}

list_demo() {
    cat <<EOF
e2fsprogs|command -v mkfs.ext4
mount|command -v losetup
rsync|command -v rsync
util-linux|command -v fstrim
EOF
}

list_test() {
    list_demo
    cat <<EOF
attr|command -v getfattr
btrfs-progs|command -v mkfs.btrfs
dbus|test -x /usr/bin/dbus-daemon
fio|command -v fio
git|command -v git
libpam-systemd|ls /usr/lib/*/security/pam_systemd.so
openssh-server|test -x /usr/sbin/sshd
procps|command -v pgrep
qemu-utils|command -v qemu-img
sqlite3|command -v sqlite3
systemd|test -x /lib/systemd/systemd
xfsprogs|command -v mkfs.xfs
EOF
}

list_bench() {
    cat <<EOF
postgresql|ls /usr/lib/postgresql/*/bin/pgbench /usr/local/bin/pgbench 2>/dev/null | grep -q .
qemu-system-common|command -v qemu-storage-daemon
EOF
}

list_vm() {
    cat <<EOF
mmdebstrap|command -v mmdebstrap
qemu-system-x86|command -v qemu-system-x86_64
EOF
}

missing=$("list_$kind" | while IFS='|' read -r package probe; do
    eval "$probe" >/dev/null 2>&1 || printf '%s ' "$package"
done)
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "These Debian packages, or what your system calls them, are missing and there is no apt-get to install them: $missing" >&2
    exit 1
fi
as_root=
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "Install these as root, then run make again: apt-get install $missing" >&2; exit 1; }
    as_root=sudo
fi
echo "installing system packages: $missing"
log=$(mktemp)
# An update may fail for one unreachable source while the packages come from another.
$as_root apt-get -qq update >"$log" 2>&1 || echo "apt-get update failed; going on with the package lists at hand" >&2
# Word splitting is wanted; the time-out waits for another apt instead of failing.
# shellcheck disable=SC2086
if ! $as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -qq -o DPkg::Lock::Timeout=300 \
    install --no-install-recommends $missing >>"$log" 2>&1 </dev/null; then
    cat "$log" >&2
    echo "Could not install: $missing (log: $log)" >&2
    exit 1
fi
rm -f "$log"
