#!/bin/sh
# Build a bundle, hold it to a committed baseline, leave the reports in $OUT. For any CI system.
#
#   RECIPE=dit-fashion-s CHECKPOINT=checkpoints/dit-fashion-s.safetensors sh examples/ci/validate.sh
#   UPDATE=1 ... makes the baseline anew, to be committed.
#
# Exits with 1 where a gate failed or a figure fell behind the baseline; the reports are there either way.
set -eu

: "${RECIPE:?set RECIPE to a name from 'dexport recipes', or to a recipe file}"
DEXPORT=${DEXPORT:-dexport}
BASELINE=${BASELINE:-ci/baseline.json}
OUT=${OUT:-out/ci}

# The validation below compares more than the build would.
# shellcheck disable=SC2086 # options are words
$DEXPORT build "$RECIPE" ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} ${BUILD_OPTIONS:-} --no-parity -o "$OUT/bundle" --force

if [ -n "${UPDATE:-}" ]; then
    # shellcheck disable=SC2086
    $DEXPORT validate "$OUT/bundle" ${VALIDATE_OPTIONS:-} -o "$OUT/report.json"
    $DEXPORT baseline update "$OUT/report.json" -o "$BASELINE"
    exit
fi

status=0
# shellcheck disable=SC2086
$DEXPORT validate "$OUT/bundle" --baseline "$BASELINE" ${VALIDATE_OPTIONS:-} \
    -o "$OUT/report.json" --markdown "$OUT/report.md" --html "$OUT/report.html" --junit "$OUT/report.xml" || status=$?
if [ -n "${GITHUB_STEP_SUMMARY:-}" ] && [ -f "$OUT/report.md" ]; then
    cat "$OUT/report.md" >>"$GITHUB_STEP_SUMMARY"
fi
exit "$status"
