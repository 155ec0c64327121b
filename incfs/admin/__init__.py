"""What an administrator can ask of an open pool: one async function per verb.

The daemon's control socket and an offline command run the same functions, so both give the
same results.  Each takes plain values and returns a document ready for JSON: sizes and
offsets in bytes, times in RFC 3339.  While the pool is mounted, changes to what the kernel
has cached go through the mount, so that its cache is right by construction.
"""

import inspect
import types
import typing
from typing import TYPE_CHECKING, Any, Final

from incfs.admin import bookmark, debug, events, policy, pool, raw, replica, snapshot, storage, transfer, volume
from incfs.admin.verb import Verb
from incfs.channel import NO_CHANNEL, Channel, Progress
from incfs.documents import Document
from incfs.errors import UsageError

if TYPE_CHECKING:
    from incfs.service import Service

VERBS: Final[dict[str, Verb]] = {
    **pool.VERBS,
    **storage.VERBS,
    **volume.VERBS,
    **snapshot.VERBS,
    **bookmark.VERBS,
    **transfer.VERBS,
    **replica.VERBS,
    **raw.VERBS,
    **events.VERBS,
    **policy.VERBS,
    **debug.VERBS,
}


async def run_verb(
    service: "Service", name: str, arguments: Document, progress: Progress, channel: Channel = NO_CHANNEL
) -> Document:
    """Run the verb ``name`` after checking its arguments against its signature.

    Raises:
        UsageError: No such verb, or arguments that it does not take.
        IncfsError: Whatever the verb raises.
    """
    verb = VERBS.get(name)
    if verb is None:
        raise UsageError(f"no such request: {name!r}; is the daemon older than this command?")
    parameters = inspect.signature(verb.run).parameters
    supplied: Document = {"service": service, "progress": progress, "channel": channel}
    own = {key: supplied[key] for key in parameters if key in supplied}
    _check_arguments(name, parameters, arguments)
    return await verb.run(**own, **arguments)


def _check_arguments(verb: str, parameters: typing.Mapping[str, inspect.Parameter], arguments: Document) -> None:
    wanted = {key: p for key, p in parameters.items() if key not in ("service", "progress", "channel")}
    for key, value in arguments.items():
        if key not in wanted or not _fits(value, wanted[key].annotation):
            raise UsageError(f"{verb} does not take {key} = {value!r}")
    if (arguments.get("rate_bytes") or 1) < 1:
        raise UsageError(f"a rate must be at least 1 byte in a second, not {arguments['rate_bytes']}")
    for key, parameter in wanted.items():
        if parameter.default is inspect.Parameter.empty and key not in arguments:
            raise UsageError(f"{verb} needs {key}")


def _fits(value: object, annotation: Any) -> bool:
    if isinstance(annotation, types.UnionType):
        return any(_fits(value, part) for part in annotation.__args__)
    if typing.get_origin(annotation) is list:
        (part,) = annotation.__args__
        return isinstance(value, list) and all(_fits(item, part) for item in value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is str:
        return isinstance(value, str) and "\0" not in value
    return isinstance(value, annotation)
