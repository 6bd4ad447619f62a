#!/usr/bin/env bash
# Put what the four calls need on a machine without a network into benchmarks/gpu/carry, which git ignores:
#   benchmarks/gpu/prepare.sh [SHARED]
# SHARED (../shared) has the real data, a tokenizer, a small checkpoint, and archives of packages in gpu/.
set -euo pipefail
cd "$(dirname "$0")/../.."
shared=${1:-../shared}
carry=benchmarks/gpu/carry
python=3.12                                            # the card machine's
wheels=(pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5) # DeepSpeed imports them

rm -rf "$carry"
mkdir -p "$carry/packages" "$carry/shared/golden/models"
cp -r --no-preserve=mode "$shared/tofu" "$carry/shared/"
cp -r --no-preserve=mode "$shared/golden/models/tiny-llama" "$carry/shared/golden/models/"
cp --no-preserve=mode "$shared"/gpu/*.tar.xz "$carry/packages/"
platforms=()
for glibc in 2_28 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "$python" --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
    --dest "$carry/packages" "${wheels[@]}" ||
    echo "warning: no wheels from PyPI: DeepSpeed's settings will say why they did not run" >&2
du -sh "$carry"
