"""What of a stream a target still lacks."""

from collections.abc import Callable

from incfs.errors import BaseMismatch
from incfs.stream.records import Link, StreamBegin


def count_present(begin: StreamBegin, has: Callable[[Link], bool]) -> int:
    """Count the first steps that a target need not take: up to the last one that it has.

    Earlier ones that it lacks were removed there on purpose.

    Raises:
        BaseMismatch: It has a part of a step that follows: of snapshots that belong together, some are gone.
    """
    present = [sum(has(link) for link in step) for step in begin.steps]
    whole = [index for index, (step, count) in enumerate(zip(begin.steps, present, strict=True)) if count == len(step)]
    first = whole[-1] + 1 if whole else 0
    for step, count in zip(begin.steps[first:], present[first:], strict=True):
        if count:
            raise BaseMismatch(
                f"the target has {count} of the {len(step)} snapshots that belong to {step[0].uuid}, not all; "
                f"remove them, or receive into other volumes"
            )
    return first
