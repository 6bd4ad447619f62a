#!/usr/bin/env bash
# One of the four calls, on a machine with a card or, with --toy, on any: benchmarks/gpu/call.sh 1|2|3|4 [--toy] ...
# Figures go to $OUT (runs/gpu). A machine that lacks our packages takes those that prepare.sh has put into carry/.
set -euo pipefail
cd "$(dirname "$0")/../.."
scripts=(training peaks engines evaluation)
case ${1-} in
    [1-4]) script=benchmarks/gpu/${scripts[$1 - 1]}.py && shift ;;
    *) echo "usage: benchmarks/gpu/call.sh 1|2|3|4 [--toy] [--only PART ...] (--help lists the parts)" >&2 && exit 2 ;;
esac
if [ -z "${PYTHON-}" ]; then
    PYTHON=.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
carry=$PWD/benchmarks/gpu/carry
path=$PWD:$PWD/benchmarks:$PWD/benchmarks/gpu
if [ -d "$carry" ] && ! "$PYTHON" -c "import hydra, datasets, peft" 2>/dev/null; then
    site=${TMPDIR:-/tmp}/tofu-packages
    if [ ! -e "$site/.whole" ]; then
        rm -rf "$site" && mkdir -p "$site"
        for archive in "$carry"/packages/*.tar.xz; do tar xJf "$archive" -C "$site"; done
        for wheel in "$carry"/packages/*.whl; do
            [ ! -e "$wheel" ] || "$PYTHON" -m zipfile -e "$wheel" "$site"
        done
        touch "$site/.whole"
    fi
    path=$site:$path
fi
[ -d ../shared ] || export TOFU_SHARED=${TOFU_SHARED:-$carry/shared}
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 TQDM_DISABLE=1
exec "$PYTHON" "$script" "$@"
