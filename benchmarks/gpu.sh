#!/usr/bin/env bash
# The benchmarks on a CUDA GPU, in float16 and, where the card has it, bfloat16:
#
#     benchmarks/gpu.sh [--device cuda|cuda:N|cpu] [--minutes 25] [--results DIR] [--python PYTHON] [--brief]
#
# Writes benchmarks/results/gpu-CARD.md (the card, its driver, PyTorch, every command with its table), and each
# benchmark's numbers as JSON in benchmarks/results/gpu-CARD/. A part that does not end in time is cut off, and the page says so.
# Exit code 0 if every benchmark ended well, 1 if not, 2 without a GPU or with a wrong flag.
# --device cpu and --brief (few rounds of the smallest sizes) try the script itself where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

fail() { echo "error: $*" >&2; exit 2; }

device=cuda minutes=25 results=benchmarks/results python=${PYTHON:-python} brief=
while [ $# -gt 0 ]; do
    case $1 in
        --device | --minutes | --results | --python)
            [ $# -ge 2 ] || fail "$1: needs a value"
            declare "${1#--}=$2"
            shift 2 ;;
        --brief) brief=yes; shift ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        *) fail "$1: no such option; --help lists them" ;;
    esac
done
[[ $device =~ ^(cpu|cuda(:[0-9]+)?)$ ]] || fail "--device $device: must be cuda, cuda:N or cpu"
[[ $minutes =~ ^[1-9][0-9]*$ ]] || fail "--minutes $minutes: must be a whole number of minutes"
command -v "$python" > /dev/null || fail "--python $python: no such program"

# The card's name, its driver, PyTorch, and the dtypes to measure; one line each.
found=$("$python" - "$device" << 'PYTHON'
import subprocess
import sys

import torch

device = torch.device(sys.argv[1])
dtypes, card, driver = ["float16"], "cpu", "none"
if device.type == "cuda":
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        sys.exit(3)
    card = torch.cuda.get_device_name(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index or 0)]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    dtypes += ["bfloat16"] * (torch.cuda.get_device_capability(device) >= (8, 0))
print(card, driver, f"{torch.__version__} (CUDA {torch.version.cuda})", " ".join(dtypes), sep="\n")
PYTHON
)
case $? in
    0) ;;
    3) fail "--device $device: PyTorch sees no such GPU, so nothing was measured; --device cpu tries the script itself" ;;
    *) fail "--python $python: PyTorch could not list its GPUs" ;;
esac
{ read -r card; read -r driver; read -r torch; read -ra dtypes; } <<< "$found"

name=gpu-$(tr -cs 'A-Za-z0-9\n' '-' <<< "$card" | sed 's/-*$//')
page=$results/$name.md numbers=$results/$name
mkdir -p "$numbers" || exit 2
deadline=$((SECONDS + 60 * minutes)) code=0
printf '# %s\n\nDriver %s, PyTorch %s, %s, %s.\n' \
    "$card" "$driver" "$torch" "${dtypes[*]}" "$(date -u +%Y-%m-%d)" > "$page"

# measure TITLE SECONDS COMMAND...: the command's table under its title, no longer than that and than what is left.
measure() {
    local title=$1 limit=$2 left=$((deadline - SECONDS))
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    printf '\n## %s\n\n    %s\n\n' "$title" "${*/#"$python"/python}" >> "$page"
    if [ "$limit" -lt 5 ]; then
        echo "Not measured: the $minutes minutes were over." >> "$page"
        echo "$title: not measured, the time is over"
        code=1
        return
    fi
    local begun=$SECONDS ended
    timeout -k 10 "$limit" "$@" 2> "$numbers/errors.txt" >> "$page"
    ended=$?
    if [ "$ended" = 124 ] || [ "$ended" = 137 ]; then
        printf '\nCut off after %s s.\n' "$limit" >> "$page"
    elif [ "$ended" != 0 ]; then
        printf '\nFailed (exit code %s):\n\n    %s\n' "$ended" "$(tail -n 1 "$numbers/errors.txt")" >> "$page"
    fi
    [ "$ended" = 0 ] || code=1
    echo "$title: exit code $ended, $((SECONDS - begun)) s"
}

run() { measure "$1" "$2" "$python" "benchmarks/$3.py" --device "$device" --output "$numbers/$3.json" "${@:4}"; }

both=(--model_dtype "${dtypes[@]}")
if [ -n "$brief" ]; then
    run "The losses alone" 120 loss "${both[@]}" --vocab_size 2000 --rows 64 --rounds 1
    run "A step beside the floor" 300 step_floor "${both[@]}" --vocab_size --rounds 1 --tiny_rounds 1 \
        --per_device_batch_size 1 --block_size 32
    run "Growth" 300 growth "${both[@]}" --tokens 256 512 768 --vocab_size 2048 3000 --at_tokens 256 --times --rounds 1
    run "The guards" 300 guard_cost "${both[@]}" --pairs 1
    measure "The memory plan" 120 "$python" benchmarks/memory_plan.py --device "$device" --only llama_2048_long \
        --output "$numbers/memory_plan.json"
    steps=2
else
    run "The losses alone" 240 loss "${both[@]}" --rounds 5
    run "A step beside the floor" 360 step_floor "${both[@]}" --rounds 15
    run "Growth" 240 growth "${both[@]}" --rounds 5 --times
    run "The guards" 180 guard_cost "${both[@]}"
    for dtype in "${dtypes[@]}"; do
        measure "The memory plan, $dtype" 240 "$python" benchmarks/memory_plan.py --device "$device" \
            --model_dtype "$dtype" --output "$numbers/memory_plan_$dtype.json"
    done
    steps=50
fi
for dtype in "${dtypes[@]}"; do
    measure "$steps steps, $dtype" 240 "$python" train_sar_kd_fp16_safe.py --device "$device" --model_dtype "$dtype" \
        --train_steps "$steps" --log_steps "$steps" --output_dir "$numbers/run_$dtype" --overwrite
    if [ -f "$numbers/run_$dtype/summary.json" ]; then
        "$python" - "$numbers/run_$dtype/summary.json" >> "$page" << 'PYTHON'
import json
import sys

found = json.load(open(sys.argv[1]))
names = "status", "applied", "skipped", "val_ppl_start", "val_ppl_final", "tokens_per_second", "peak_memory_bytes"
print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
print("| " + " | ".join(str(found[name]) for name in names) + " |")
PYTHON
        mv "$numbers/run_$dtype/summary.json" "$numbers/summary_$dtype.json"
    fi
    rm -rf "$numbers/run_$dtype"
done
rm -f "$numbers/errors.txt"
echo "$page"
exit "$code"
