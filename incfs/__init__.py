"""incfs: a pool of storage volumes, mounted as sparse files with instant snapshots."""

import contextlib

__version__ = "0.1.0"

# pyfuse3 binds to libfuse when it is imported, and the extension has to be there by then. As part of
# the package's own import the order holds however the importing module sorts its imports. What went
# wrong, if anything, is said by `incfs.fusext.install` when somebody mounts.
with contextlib.suppress(ImportError):
    from incfs import _fusext as _fusext
