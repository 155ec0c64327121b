#!/bin/sh
# Prints the Python to build with: the newest of 3.11-3.13, then python3, that can make a virtual
# environment and compile an extension; failing that, one whose missing parts apt can add.
# Candidates are run, not just looked up: a pyenv shim exists for versions that are not selected.
complete='import sys, venv, ensurepip, os, sysconfig
sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
names="python3.13 python3.12 python3.11 python3"

for name in $names; do
    "$name" -c "$complete" 2>/dev/null && { echo "$name"; exit 0; }
done
for name in $names /usr/bin/python3; do
    "$name" -c "$new_enough" 2>/dev/null && { echo "$name"; exit 0; }
done
echo "incfs needs Python 3.11 or newer; none of '$names' is. Install one, or say make PYTHON=/path/to/python." >&2
exit 1
