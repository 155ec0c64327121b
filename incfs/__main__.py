"""``python -m incfs`` is ``incfs``."""

from incfs.cli import main

main()
