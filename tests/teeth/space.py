"""Breakages of the account of space, and of what is asked of the host before a block is given out."""

from collections.abc import Sequence

from tests.teeth.breakage import Breakage

_ACCOUNT = "tests/service/test_account.py::"
_ONCE = f"{_ACCOUNT}test_blocks_that_went_back_to_the_host_count_once"
_AGAIN = f"{_ACCOUNT}test_what_went_back_to_the_host_is_known_when_the_pool_is_opened_again"

SPACE: Sequence[Breakage] = [
    Breakage(
        "punched-blocks-are-leased-at-once",
        "I15",
        "incfs/storage.py",
        "        self.unbacked.add(group_index, bits, punched)\n",
        "        self.set_busy(group_index, bits, busy=False)\n",
        "tests/unit/test_pool.py::test_punched_blocks_are_leased_once_the_host_has_given_their_space_again",
    ),
    Breakage(
        "punched-blocks-count-twice",
        "I15",
        "incfs/account.py",
        "            kept = max(0, volume.grown_blocks - volume.live_blocks - lacking)",
        "            kept = max(0, volume.grown_blocks - volume.live_blocks)",
        f"{_ONCE}[tmpfs]",
    ),
    Breakage(
        "free-blocks-trusted-after-opening",
        "I15",
        "incfs/recovery.py",
        "            store.pool.doubt()\n",
        "",
        f"{_AGAIN}[tmpfs]",
    ),
    Breakage(
        "space-got-again-below-the-reserve",
        "I15",
        "incfs/storage.py",
        "        if got and max(costs) <= room_bytes:",
        "        if got:",
        f"{_AGAIN}[ext4]",
    ),
    Breakage(
        "the-reserve-counts-as-free",
        "I15",
        "incfs/account.py",
        "        return max(self.reserve_bytes(host), volume.refused_bytes)",
        "        return volume.refused_bytes",
        f"{_ACCOUNT}test_the_hosts_reserve_is_not_free[60]",
    ),
    Breakage(
        "a-shared-host-counts-for-each-image",
        "I15",
        "incfs/account.py",
        "                taken[leg.device] += (lacking + longer) * self._block_bytes",
        "                taken[leg.device] += 0",
        f"{_ACCOUNT}test_several_images_on_one_filesystem_share_it",
    ),
    Breakage(
        "two-legs-on-a-host-count-as-one",
        "I15",
        "incfs/storage.py",
        " // self._legs_on[host.device]\n",
        "\n",
        f"{_ACCOUNT}test_each_leg_of_a_mirror_takes_its_host[one-disk]",
    ),
    Breakage(
        "no-room-kept-for-the-metadata",
        "I15",
        "incfs/account.py",
        "        if host.device not in self.metadata_devices:",
        "        if host.device:",
        f"{_ACCOUNT}test_a_small_filesystem_keeps_room_for_the_metadata",
    ),
    Breakage(
        "a-refused-write-is-given-up",
        "I15",
        "incfs/driver.py",
        "        if storage_id is None:\n            raise error",
        "        if storage_id is None or refused == {}:\n            raise error",
        f"{_ACCOUNT}test_a_write_that_one_host_refuses_goes_to_another[native]",
    ),
    Breakage(
        "a-refused-move-is-given-up",
        "I15",
        "incfs/mover.py",
        "                await self._driver.turn_away(error, refused)",
        "                raise",
        f"{_ACCOUNT}test_a_move_that_one_host_refuses_goes_to_another",
    ),
    Breakage(
        "a-full-pool-is-pruned-by-the-clock",
        "policy",
        "incfs/keeper.py",
        "            self.low()\n",
        "            pass\n",
        "tests/service/test_space.py::test_a_write_that_waits_has_the_policy_prune",
    ),
    Breakage(
        "cached-writers-are-not-told-of-a-full-pool",
        "policy",
        "incfs/mount.py",
        "        fusext.refuse_writers(True)\n",
        "",
        "tests/mount/test_data.py::test_a_writer_that_the_kernel_caches_for_hears_that_the_pool_is_full[python]",
    ),
    Breakage(
        "a-full-pool-refuses-those-who-read",
        "policy",
        "incfs/fuse_hot_serve.c",
        "    return handle & ONLY_WRITES && atomic_load",
        "    return handle && atomic_load",
        "tests/mount/test_data.py::test_a_writer_that_the_kernel_caches_for_hears_that_the_pool_is_full[native]",
    ),
    Breakage(
        "what-a-host-reserved-is-believed-after-it-refused",
        "I15",
        "incfs/storage.py",
        "                if self._must_prove:",
        "                if self._must_prove and not keep_size:",
        f"{_ACCOUNT}test_a_write_that_one_host_refuses_goes_to_another[python]",
    ),
    Breakage(
        "a-file-limit-is-a-failed-disk",
        "I15",
        "incfs/backing.py",
        "NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)",
        "NO_ROOM = (errno.ENOSPC, errno.EDQUOT)",
        f"{_ACCOUNT}test_an_image_that_may_be_no_longer_is_full_and_no_failure[python]",
    ),
    Breakage(
        "a-file-limit-fails-the-hot-threads",
        "I15",
        "incfs/plane_files.c",
        "    return host_errno == ENOSPC || host_errno == EDQUOT || host_errno == EFBIG;",
        "    return host_errno == ENOSPC || host_errno == EDQUOT;",
        "tests/unit/test_served.py::test_a_served_write_to_a_file_that_may_be_no_longer_harms_nothing",
    ),
]
