#!/usr/bin/env bash
# Fetch what prunebench needs and a bare GPU machine lacks, as wheels for its Python, into .gpu/whl: wheels.sh [FOLDER]
#
# The machine has torch, transformers, numpy, pandas, pyarrow, scipy, rich, typer, pytest and their like. plotly is left out: it
# takes 9 MiB and draws figures only. In all about 15 MiB; the tree that travels with it has 41 of the 64 that may.
# PYTHON is one with pip (the project's .venv has one); versions are those of constraints.txt.
set -eu
cd "$(dirname "$0")/../.."
FOLDER=${1:-.gpu/whl}
PYTHON=${PYTHON:-python3}

WHEELS='annotated-types chardet DataProperty datasets defusedxml dill dominate evaluate lm_eval Logbook mbstrdecoder more-itertools
  msgfy multiprocess nltk pathvalidate platformdirs pydantic pydantic_core pytablewriter pytz tabledata tomlkit typepy
  typing-inspection'
SOURCES='rouge_score sqlitedict word2number'  # published as sources only; pure Python, so built here

pinned() { for name in "$@"; do grep -iE "^$name==" constraints.txt || { echo "constraints.txt has no $name" >&2; exit 1; }; done; }

mkdir -p "$FOLDER"
rm -f "$FOLDER"/*.whl
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${tag}_x86_64"); done
# shellcheck disable=SC2046,SC2086
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
  -d "$FOLDER" $(pinned $WHEELS)
# shellcheck disable=SC2046,SC2086
"$PYTHON" -m pip wheel -q --no-deps -w "$FOLDER" $(pinned $SOURCES)
du -sh "$FOLDER"
