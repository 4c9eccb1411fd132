#!/bin/sh
# check_python.sh PYTHON: fail with one sentence unless PYTHON can make the virtual environment of megastar.
# setup.py, README.md and tests/unit/test_pythons.py name the same versions.
oldest=3.11 newest=3.14
wanted="install Python $oldest to $newest (Debian: apt-get install python3 python3-venv; any Linux: uv python install 3.13) and run make PYTHON=python3.13"
command -v "$1" >/dev/null || {
    echo "$1 is not installed: $wanted" >&2
    exit 1
}
version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || {
    echo "$1 is not a Python interpreter: $wanted" >&2
    exit 1
}
minor=${version#3.}
if [ "$minor" = "$version" ] || [ "$minor" -lt "${oldest#3.}" ] || [ "$minor" -gt "${newest#3.}" ]; then
    echo "Python $version is not supported: $wanted" >&2
    exit 1
fi
"$1" -c 'import ensurepip, venv' 2>/dev/null || {
    echo "$1 cannot make virtual environments: install its venv package (Debian: apt-get install python$version-venv)" >&2
    exit 1
}
