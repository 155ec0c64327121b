"""A daemon without a mount: ``python -m tests.support.daemon POOL`` serves the pool's admin socket."""

import sys
from pathlib import Path

import trio

from incfs.control import serve_control
from incfs.service import open_service


async def serve(directory: Path) -> None:
    """Serve until stdin ends."""
    async with open_service(directory) as service, trio.open_nursery() as nursery:
        await nursery.start(serve_control, service)
        print("serving", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(serve, Path(sys.argv[1]))
