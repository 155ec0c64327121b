"""Build of the C extension; everything else is in pyproject.toml."""

import os
import shlex
import subprocess

from setuptools import Extension, setup


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
            ["incfs/_fusext.c", "incfs/fuse_hot.c"],
            depends=["incfs/fuse_hot.h", "incfs/hot.h"],
            extra_compile_args=[*flags, "-pthread", *pkg_config("--cflags")],
            extra_link_args=["-pthread"],
            # Not linked with libfuse3: the module must be first to define fuse_session_new, and
            # finds the real one with dlopen (see the top of _fusext.c).
            libraries=["dl"],
        ),
        Extension(
            "incfs._dataplane",
            ["incfs/_dataplane.c", "incfs/plane.c", "incfs/plane_io.c", "incfs/lane.c", "incfs/crc32c.c"],
            depends=["incfs/plane.h", "incfs/lane.h", "incfs/plane_internal.h", "incfs/crc32c.h", "incfs/hot.h"],
            extra_compile_args=[*flags, "-pthread"],
            extra_link_args=["-pthread"],
        ),
    ]
)
