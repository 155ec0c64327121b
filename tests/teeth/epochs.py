"""Breakages of what keeps the parts of a pool from being taken for ones that belong together."""

from typing import Final

from tests.teeth.breakage import Breakage

_MIXED: Final = "tests/crash/test_epochs.py::test_parts_of_different_times_are_refused_or_stale_and_never_wrong"
_CUT: Final = "tests/crash/test_epochs.py::test_every_cut_of_a_clean_end_gives_the_pool_back"
_SERVICE: Final = "tests/service/test_epochs.py::"
_UNIT: Final = "tests/unit/test_epoch.py::"

EPOCHS: Final = (
    Breakage(
        "parts-raised-before-the-directory-says-so",
        "I14",
        "incfs/parts.py",
        "        self._write(directories, replace(before, raising=to))\n",
        "",
        _CUT,
    ),
    Breakage(
        "directory-settles-before-its-parts",
        "I14",
        "incfs/parts.py",
        "    write_stamp(file, stamp)\n    file.sync()\n",
        "    write_stamp(file, stamp)\n",
        _CUT,
    ),
    Breakage(
        "tables-before-the-stamps-of-their-checkpoint",
        "I14",
        "incfs/store.py",
        "            self.pool.sync_stamped(Stamp(self.standing.settled, point))",
        "            self.pool.sync_stamped(Stamp(self.standing.settled, Point(0, 0)))",
        _MIXED,
    ),
    Breakage(
        "newer-parts-fit",
        "I14",
        "incfs/epoch.py",
        "            return Fit.NEWER\n        return Fit.OLDER",
        "            return Fit.FITS\n        return Fit.OLDER",
        f"{_SERVICE}test_a_directory_copied_while_the_pool_is_open_is_older_after_the_next_checkpoint",
    ),
    Breakage(
        "later-epochs-fit",
        "I14",
        "incfs/epoch.py",
        "    if stamp.epoch.counter > standing.newest.counter:\n        return Fit.NEWER",
        "    if stamp.epoch.counter > standing.newest.counter:\n        return Fit.FITS",
        f"{_SERVICE}test_an_older_directory_is_refused_before_anything_is_touched",
    ),
    Breakage(
        "older-parts-fit",
        "I14",
        "incfs/epoch.py",
        "    return Fit.FORKED if stamp.epoch.counter in counters else Fit.OLDER",
        "    return Fit.FORKED if stamp.epoch.counter in counters else Fit.FITS",
        f"{_SERVICE}test_an_older_image_is_refused",
    ),
    Breakage(
        "forks-fit",
        "I14",
        "incfs/epoch.py",
        "    return Fit.FORKED if stamp.epoch.counter in counters else Fit.OLDER",
        "    return Fit.FITS if stamp.epoch.counter in counters else Fit.OLDER",
        f"{_UNIT}test_how_a_part_stands_to_a_directory",
    ),
    Breakage(
        "older-within-an-epoch-fits",
        "I14",
        "incfs/epoch.py",
        "        return Fit.OLDER if is_behind(stamp.point, folded) else Fit.FITS",
        "        return Fit.FITS",
        _MIXED,
    ),
    Breakage(
        "older-copy-of-a-leg-taken-for-the-leg",
        "I14",
        "incfs/legs.py",
        "    return stamp.epoch == Epoch(*left[1:3]) and not is_behind(stamp.point, Point(*left[3:]))",
        "    return True",
        f"{_SERVICE}test_an_older_copy_of_a_leg_that_was_left_behind_gets_everything",
    ),
    Breakage(
        "unproved-tables-give-space-back",
        "I14",
        "incfs/store.py",
        "        self.pool.reuse.is_withheld = standing.is_unproved",
        "        self.pool.reuse.is_withheld = False",
        f"{_SERVICE}test_who_insists_goes_on_and_gives_nothing_back_before_a_check",
    ),
    Breakage(
        "adopted-directory-taken-for-proved",
        "I14",
        "incfs/parts.py",
        "        after = Standing(to, is_unproved=before.is_unproved or before.is_adopting)",
        "        after = Standing(to, is_unproved=before.is_unproved)",
        f"{_SERVICE}test_a_restored_directory_takes_the_images_over",
    ),
    Breakage(
        "clean-end-raises-nothing",
        "I14",
        "incfs/service.py",
        "            await offload(store.raise_epoch)  #",
        "            pass  #",
        f"{_SERVICE}test_a_directory_copied_before_an_end_without_a_checkpoint_is_older",
    ),
    Breakage(
        "opening-raises-nothing",
        "I14",
        "incfs/muster.py",
        "    standing, failed = begun.run(standing, next_epoch(*seen))\n",
        "    standing, failed = begun.run(standing, standing.settled)\n",
        f"{_SERVICE}test_two_forks_that_crashed_do_not_share_images",
    ),
)
