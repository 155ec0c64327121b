"""Every breakage."""

from collections.abc import Sequence

from tests.teeth.breakage import Breakage
from tests.teeth.core import CORE
from tests.teeth.domain import DOMAIN
from tests.teeth.durability import DURABILITY
from tests.teeth.epochs import EPOCHS
from tests.teeth.metadata import COPIES
from tests.teeth.mounted import MOUNTED
from tests.teeth.native import NATIVE
from tests.teeth.policy import POLICY
from tests.teeth.schedules import SCHEDULES
from tests.teeth.shell import SHELL
from tests.teeth.space import SPACE

ROOMS: Sequence[Sequence[Breakage]] = (
    (*DURABILITY, *COPIES, *EPOCHS),
    (*CORE, *SPACE),
    DOMAIN,
    (*NATIVE, *SCHEDULES),
    (*SHELL, *MOUNTED),
    POLICY,
)
BREAKAGES: Sequence[Breakage] = [breakage for room in ROOMS for breakage in room]
