#!/usr/bin/env bash
# What a GPU says, in at most nine minutes: tests/test_cuda.py, then the three benchmarks as they are meant for a GPU.
# Run: benchmarks/gpu.sh OUTPUT [--wheels FOLDER] [--authors CMT.PY] [--cpu]
#
# OUTPUT gets results.json, tables.md, and what each part printed as PART.log. A part that fails or runs out of its time
# does not stop the next one. The exit status is 0 where all went well.
#
# Nothing is downloaded. FOLDER (dist by default) holds wheels of this package and of timm, and of what else the machine
# lacks: pytest, pytest-xdist, execnet, tqdm, huggingface_hub, safetensors, pyyaml. They are installed without their
# dependencies into a folder of their own, so that the machine's torch stays as it is:
#   python -m build --wheel && pip download --no-deps --dest dist timm
# CMT.PY, of a clone of the authors' code, is measured too. --cpu runs the same lines on the CPU at tiny sizes.
set -uo pipefail

output= wheels= authors= device=cuda
while (($#)); do
    case $1 in
    --wheels) wheels=$(realpath "$2") && shift ;;
    --authors) authors=$(realpath "$2") && shift ;;
    --cpu) device=cpu ;;
    -*) echo "gpu.sh: error: there is no option $1" >&2 && exit 2 ;;
    *) output=$1 ;;
    esac
    shift
done
[ -n "$output" ] || { echo "gpu.sh: error: name a folder for the results" >&2 && exit 2; }
mkdir -p "$output" && output=$(realpath "$output")
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

shopt -s nullglob
found=("${wheels:-dist}"/*.whl)
if ((${#found[@]})); then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "${found[@]}" || exit
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
else
    echo "no wheels in ${wheels:-dist}: what is installed is measured"
fi

ours=(cmt_s) given=()
[ -z "$authors" ] || ours=(authors:cmt_s cmt_s) given=(--authors "$authors")
models=("${ours[@]}" deit_small_patch16_224 "${given[@]}")
# With 128 images the GPU waits for Python; 256 is what timm's benchmark.py takes.
common=(--dtype bfloat16 --channels-last --batch-size 256 --rounds 20)
throughput=(--models "${models[@]}" --modes eager reparam train recompute "${common[@]}")
compiled=(--models "${models[@]}" --modes eager compile "${common[@]}") # apart, for it may take too long
memory=(--models "${ours[@]}" "${given[@]}" --dtype bfloat16 --batch-size 32)
image_size=(--model cmt_s --batch-size 32)
limits=(150 90 180 60 40) # seconds of the five parts
if [ $device = cpu ]; then
    throughput=(--models cmt_ti deit_tiny_patch16_224 --modes eager reparam train recompute --size 64 --batch-size 2
        --rounds 2)
    compiled=(--models deit_tiny_patch16_224 --modes eager compile --size 64 --batch-size 1 --rounds 2)
    memory=(--models cmt_ti --batch-size 1)
    image_size=(--model cmt_ti --built-at 64 --sizes 64 96 --rounds 2)
    limits=(900 600 600 300 300)
fi

failed=0
part() { # NAME SECONDS COMMAND...: stdout into NAME.md, everything into NAME.log
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    echo "== $name, at most $limit s"
    timeout --kill-after=5 "$limit" "$@" > "$work/$name.md" 2> "$output/$name.log"
    status=$?
    tee -a "$output/$name.log" < "$work/$name.md"
    printf '{"status": %d, "seconds": %d}\n' $status $((SECONDS - start)) > "$work/$name.status"
    ((status == 0)) || { failed=1 && echo "$name ended with $status; see $name.log" | tee -a "$work/$name.md"; }
}

export TIMM_CMT_TEST_DEVICE=$device PYTHONUNBUFFERED=1
# On a GPU six at a time, or compiling takes too long. Without the folder that Python is started in, so that the package
# is the installed one.
many=
[ $device = cpu ] || many="-n 6"
part tests "${limits[0]}" env PYTHONSAFEPATH=1 "$python" -m pytest -p no:cacheprovider --durations=5 $many \
    --show-capture=no tests/test_cuda.py
benchmark() { # NAME SECONDS SCRIPT OPTIONS...
    part "$1" "$2" "$python" "benchmarks/$3.py" --device $device --json "$work/$1.json" "${@:4}"
}
benchmark throughput "${limits[1]}" throughput "${throughput[@]}"
benchmark compiled "${limits[2]}" throughput "${compiled[@]}"
benchmark memory "${limits[3]}" memory "${memory[@]}"
benchmark image_size "${limits[4]}" image_size "${image_size[@]}"

"$python" - "$work" "$output" << 'EOF' || failed=1
import json
import sys
from pathlib import Path

work, output = map(Path, sys.argv[1:])
results, pages = {}, []
for name in ("tests", "throughput", "compiled", "memory", "image_size"):
    figures = work / f"{name}.json"
    results[name] = json.loads((work / f"{name}.status").read_text())
    results[name].update(json.loads(figures.read_text()) if figures.exists() else {})
    printed = (work / f"{name}.md").read_text().strip()
    if name == "tests":
        results[name]["printed"] = [line.strip() for line in printed.splitlines() if line.startswith(("    ", "="))]
        printed = f"```\n{printed}\n```"
    pages.append(f"## {name}\n\n{printed}\n")
(output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
(output / "tables.md").write_text("\n".join(pages))
EOF
echo "$SECONDS s in all; results in $output"
exit $failed
