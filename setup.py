"""Build of the C extension; everything else is in pyproject.toml."""

import os
import shlex
import subprocess

from setuptools import Extension, setup


def pkg_config(option: str) -> list[str]:
    return shlex.split(
        subprocess.run(["pkg-config", option, "fuse3"], check=True, capture_output=True, text=True).stdout
    )


FLAGS = ["-std=gnu11", "-O2", "-D_FILE_OFFSET_BITS=64", "-Wall", "-Wextra"]
# Developers' builds (make) stop at a warning; a stranger's newer compiler must not.
strict = ["-Werror"] if os.environ.get("INCFS_WERROR") else []

setup(
    ext_modules=[
        Extension(
            "incfs._fusext",
            ["incfs/_fusext.c"],
            extra_compile_args=[
                "-std=gnu11",
                "-O2",
                "-D_FILE_OFFSET_BITS=64",
                "-Wall",
                "-Wextra",
                *strict,
                *pkg_config("--cflags"),
            ],
            # Not linked with libfuse3: the module must be first to define fuse_session_new, and
            # finds the real one with dlopen (see the top of _fusext.c).
            libraries=["dl"],
        )
    ]
)
