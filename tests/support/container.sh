#!/bin/bash
# Boots systemd in namespaces of its own, over this machine's root; what it changes there lies in DIR.
#   usage: container.sh DIR CGROUP BIND...
set -eu
dir=$1 cgroup=$2
shift 2
echo $$ >"$cgroup/cgroup.procs"
export dir
exec unshare --cgroup --pid --mount --uts --ipc --fork --kill-child bash -eu -s "$@" <<'INSIDE'
root=$dir/root
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=/,upperdir=$dir/upper,workdir=$dir/work" "$root"
for bound in "$@"; do
    mkdir -p "$root$bound"
    mount --bind "$bound" "$root$bound"
done
mount --bind "$dir/srv" "$root/srv"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for node in null zero full random urandom tty fuse loop-control; do
    cp -a "/dev/$node" "$root/dev/$node"
done
for number in $(seq 0 63); do
    mknod "$root/dev/loop$number" b 7 "$number"
done
# Of this machine's units none is wanted but systemd's own.
rm -rf "$root/etc/systemd/system"
cp -a "$dir/units" "$root/etc/systemd/system"
cp "$dir/fstab" "$root/etc/fstab"
cp -a "$dir/etc/." "$root/etc/"
cp "$dir/incfs" "$root/usr/local/bin/incfs"
hostname guest
cd "$root"
mkdir -p old
pivot_root . old
umount -l old
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd systemd.unit=guest.target
INSIDE
