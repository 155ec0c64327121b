"""Build of the C extension; everything else is in pyproject.toml."""

import os
import shlex
import subprocess
from glob import glob

from setuptools import Extension, setup


def sources(*patterns: str) -> list[str]:
    return sorted(path for pattern in patterns for path in glob(f"incfs/{pattern}"))


def pkg_config(option: str) -> list[str]:
    return shlex.split(
        subprocess.run(["pkg-config", option, "fuse3"], check=True, capture_output=True, text=True).stdout
    )


# Developers' builds (make) stop at a warning; a stranger's newer compiler must not.
strict = ["-Werror"] if os.environ.get("INCFS_WERROR") else []
# Hidden: only what a module exports on purpose may reach the global scope that _fusext enters.
flags = ["-std=gnu11", "-O2", "-D_FILE_OFFSET_BITS=64", "-Wall", "-Wextra", "-fvisibility=hidden", *strict]

setup(
    ext_modules=[
        Extension(
            "incfs._fusext",
            sources("_fusext*.c", "fuse_*.c"),
            depends=sources("*.h"),
            extra_compile_args=[*flags, "-pthread", *pkg_config("--cflags")],
            extra_link_args=["-pthread"],
            # Not linked with libfuse3: the module must be first to define fuse_session_new, and
            # finds the real one with dlopen (see the top of _fusext.c).
            libraries=["dl"],
        ),
        Extension(
            "incfs._guard",
            sources("_guard.c"),
            extra_compile_args=flags,
        ),
        Extension(
            "incfs._mappings",
            sources("_mappings*.c", "mappings.c"),
            depends=sources("*.h"),
            extra_compile_args=flags,
        ),
        Extension(
            "incfs._dataplane",
            sources("_dataplane*.c", "plane*.c", "lane.c", "crc32c.c"),
            depends=sources("*.h"),
            extra_compile_args=[*flags, "-pthread"],
            extra_link_args=["-pthread"],
        ),
    ]
)
