#!/bin/sh
# other_pythons.sh PYTHON: the supported interpreters of this machine with other versions than PYTHON, one of each version: on
# PATH, or installed by pyenv.
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
mine=$(version "${1:-python3}")
for wanted in 3.11 3.12 3.13 3.14; do
    [ "$wanted" != "$mine" ] || continue
    for python in "python$wanted" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$wanted".*/bin/python; do
        if [ "$(version "$python")" = "$wanted" ] && sh "$(dirname "$0")/check_python.sh" "$python" 2>/dev/null; then
            echo "$python"
            break
        fi
    done
done
