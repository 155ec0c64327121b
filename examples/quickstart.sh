#!/usr/bin/env bash
# The main job, on this machine's own files: a pool, a volume, ext4 in it, a snapshot, a pulled plug.
# Run by `make demo`. Works in a scratch directory, removes it, and ends with a verdict.
# Usage: examples/quickstart.sh [SOURCE]      SOURCE: a directory to copy, /usr/share/doc by default
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$here/.venv/bin:$PATH:/usr/sbin:/sbin"
[ "$(id -u)" = 0 ] || exec sudo --preserve-env=PATH "$0" "$@"

source_dir=${1:-/usr/share/doc}
[ -n "$(ls -A "$source_dir" 2>/dev/null)" ] || source_dir=/usr/include
work=$(mktemp -d "${TMPDIR:-/tmp}/incfs-demo.XXXXXX")
mnt=$work/mnt fs=$work/fs old=$work/old
export INCFS_POOL=$work/pool

cleanup() {
    set +e
    for dir in "$old" "$fs"; do mountpoint -q "$dir" && umount -l "$dir"; done
    for image in "$mnt/db" "$work/copy.img"; do
        losetup --noheadings --output NAME --associated "$image" 2>/dev/null | xargs -r losetup -d
    done
    mountpoint -q "$mnt" && { incfs umount "$mnt" || umount -l "$mnt"; }
    rm -rf --one-file-system "$work"
}
trap cleanup EXIT

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
fail() { printf '\nFAILED: %s\n' "$*" >&2; exit 1; }
digest() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum); }

mkdir "$mnt" "$fs" "$old"

say "1. A pool, mounted: one directory, one sparse file for each virtual volume"
incfs pool create "$INCFS_POOL"
incfs mount "$INCFS_POOL" "$mnt"
incfs volume create db 2G
ls -lsh "$mnt/db"

say "2. ext4 on that file, filled with $source_dir"
loop=$(losetup --find --show "$mnt/db")
mkfs.ext4 -q "$loop"
mount "$loop" "$fs"
cp -a "$source_dir" "$fs/data"
sync -f "$fs"
echo "$(find "$fs/data" | wc -l) files; the volume of 2 GiB occupies $(du -h "$mnt/db" | cut -f1)"

say "3. A snapshot, while the filesystem is in use; copied out with cp and rsync"
incfs snapshot create db@monday
cp --sparse=auto "$mnt/.snapshots/db/monday" "$work/copy.img"
rsync --sparse "$mnt/.snapshots/db/monday" "$work/copy2.img"
cmp "$work/copy.img" "$work/copy2.img" || fail "cp and rsync disagree"
echo "two equal copies of $(du -h --apparent-size "$work/copy.img" | cut -f1)," \
    "which occupy $(du -h "$work/copy.img" | cut -f1) and $(du -h "$work/copy2.img" | cut -f1)"

say "4. Go on writing: delete half of the files, trim, write others"
echo "before: the volume occupies $(du -h "$mnt/db" | cut -f1)"
find "$fs/data" -type f | awk 'NR % 2' | tr '\n' '\0' | xargs -0 rm -f
sync -f "$fs"
fstrim "$fs"
date > "$fs/written-after-the-snapshot"
sync -f "$fs"
echo "after:  the volume occupies $(du -h "$mnt/db" | cut -f1)"
cmp "$work/copy.img" "$mnt/.snapshots/db/monday" || fail "the snapshot changed"
mount -o loop "$work/copy.img" "$old"
diff -r --no-dereference "$source_dir" "$old/data" >/dev/null || fail "the snapshot's files differ from $source_dir"
umount "$old"
echo "the snapshot did not change, and has every file of $source_dir"

say "5. Pull the plug: kill -9 the daemon right after a sync"
echo acknowledged > "$fs/last-words"
sync -f "$fs"
wanted=$(digest "$fs")
kill -9 "$(cat "$INCFS_POOL/lock")"
umount -l "$fs"
losetup -d "$loop"
ls "$mnt" 2>&1 | sed 's/^/the dead mount says: /' || true

say "6. Come back"
incfs mount "$INCFS_POOL" "$mnt"
loop=$(losetup --find --show "$mnt/db")
e2fsck -fp "$loop" >/dev/null || [ $? -le 1 ] || fail "e2fsck found damage"
mount "$loop" "$fs"
[ "$(digest "$fs")" = "$wanted" ] || fail "an acknowledged write is lost"
echo "every acknowledged byte is there: $(cat "$fs/last-words")"
umount "$fs"
losetup -d "$loop"

say "7. Unmount, which returns when everything is on disk, and check every block"
incfs umount "$mnt"
incfs pool check --data

say "OK: snapshot taken, copied and compared; plug pulled; nothing lost."
