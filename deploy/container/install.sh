#!/bin/sh
# install.sh cpu|cuda VENV: install megastar and its pinned packages into the new virtual environment VENV, from the current
# directory, a clone. Used by Dockerfile and apptainer.def.
#
# TORCH_INDEX: package index of torch, for cpu one of CPU builds (docs/containers.md). PYTHON: the interpreter (python3).
# EXTRAS: extras of the package, separated by commas (eval,completion,hub); trackers, for example, as eval,completion,hub,wandb.
set -eu
device=$1 venv=$2
export DS_BUILD_OPS=0 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 # DeepSpeed compiles its operators at first use
case $device in
cpu | cuda) ;;
*)
    echo "install.sh: $device is neither cpu nor cuda" >&2
    exit 2
    ;;
esac
if [ "$device" = cpu ] && [ -z "${TORCH_INDEX:-}${PIP_FIND_LINKS:-}" ]; then
    echo "install.sh: set TORCH_INDEX to a package index of CPU builds of torch: the default builds take gigabytes" >&2
    exit 2
fi
extras=${EXTRAS:-eval,completion,hub}
for extra in $(echo "$extras" | tr , ' '); do # pip only warns of an unknown one
    grep -q "^        \"$extra\": \[" setup.py || {
        echo "install.sh: EXTRAS=$extras: setup.py has no extra $extra" >&2
        exit 2
    }
done
sh tools/check_python.sh "${PYTHON:-python3}"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
# A CPU build has no triton.
if [ "$device" = cpu ]; then grep -v '^triton==' constraints.txt; else cat constraints.txt; fi >"$venv/constraints.txt"
"$venv/bin/pip" install -c "$venv/constraints.txt" ".[$extras]"
"$venv/bin/megastar" --version
