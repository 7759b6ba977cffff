#!/usr/bin/env bash
# The benchmarks on a CUDA GPU, in float16 and, where the card has it, bfloat16:
#
#     benchmarks/gpu.sh [--device cuda|cuda:N|cpu] [--minutes 10] [--results DIR] [--python PYTHON] [--brief]
#
# What matters most comes first: the main job; a pair of the size of real models, in full and with LoRA, its peak memory
# beside the plan (and real models, where `real_models.py --prepare` has left them); the losses and whole steps, beside
# TRL's where TRL is installed; a loss scale that overflows; two places for the teacher. What then is left of the time
# goes to the floor, growth, the guards and the other memory plans. Nothing is downloaded: `pack_gpu.py` packs what a
# machine that has only PyTorch needs, and its packages are used from where they were unpacked.
# Writes benchmarks/results/gpu-CARD.md (the card, its driver, PyTorch, every command with its table), and each
# benchmark's numbers as JSON in benchmarks/results/gpu-CARD/. A part that does not end in time is cut off, and the page says so.
# Exit code 0 if every benchmark ended well, 1 if not, 2 without a GPU or with a wrong flag.
# --device cpu and --brief (few rounds of the smallest sizes) try the script itself where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

fail() { echo "error: $*" >&2; exit 2; }

device=cuda minutes=10 results=benchmarks/results python=${PYTHON:-python} brief=
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

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
models=benchmarks/models/real wheels=benchmarks/models/wheels
if [ -d "$wheels" ]; then  # of pack_gpu.py
    site=$PWD/benchmarks/models/site
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$wheels"/*.whl \
        || fail "--python $python: the packages in $wheels cannot be installed"
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

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

# job TITLE SECONDS FLAGS...: a run of the script, and the row of its summary.
job() {
    local title=$1 limit=$2 folder=$numbers/run
    shift 2
    measure "$title" "$limit" "$python" train_sar_kd_fp16_safe.py --device "$device" --train_steps "$steps" \
        --log_steps "$steps" --eval_steps "$steps" --output_dir "$folder" --overwrite --quiet "$@"
    if [ -f "$folder/summary.json" ]; then
        "$python" - "$folder/summary.json" >> "$page" << 'PYTHON'
import json
import sys

found = json.load(open(sys.argv[1]))
names = "status", "applied", "skipped", "val_ppl_start", "val_ppl_final", "tokens_per_second", "peak_memory_bytes"
print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
print("| " + " | ".join(str(found[name]) for name in names) + " |")
PYTHON
        mv "$folder/summary.json" "$numbers/summary-$(tr -cs 'a-z0-9\n' '-' <<< "${title,,}").json"
    fi
    rm -rf "$folder"
}

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

both=(--model_dtype "${dtypes[@]}") steps=50 rounds=3 plans=(real)
loss=() trl=() floor=() growth=() guards=() rest=()
if [ -n "$brief" ]; then
    steps=2 rounds=1 plans=(llama_2048_long)
    loss=(--vocab_size 2000 --rows 64)
    trl=(--vocab_size 2000 --tokens 400 --steps 5)
    floor=(--vocab_size --tiny_rounds 1 --per_device_batch_size 1 --block_size 32)
    growth=(--tokens 256 512 768 --vocab_size 2048 3000 --at_tokens 256)
    guards=(--pairs 1)
    rest=(--only embedded_batch_16)
fi

for dtype in "${dtypes[@]}"; do
    job "The main job, $dtype" 90 --model_dtype "$dtype"
done
measure "A pair of real size, full and LoRA" 120 "$python" benchmarks/memory_plan.py --device "$device" \
    --only "${plans[@]}" --output "$numbers/memory_plan_pair.json"
if [ -z "$brief" ] && [ -f "$models/smollm2/config.json" ] && [ -f "$models/smollm2_cut/config.json" ]; then
    pair=(--teacher_model "$models/smollm2" --student_model "$models/smollm2_cut" --model_dtype float16)
    job "Real models, full" 90 "${pair[@]}"
    has peft && job "Real models, LoRA" 90 "${pair[@]}" --lora_rank 16
fi
run "The losses alone" 100 loss "${both[@]}" --rounds "$rounds" "${loss[@]}"
if has trl && has datasets; then
    measure "Whole steps beside TRL" 150 "$python" benchmarks/trl_trainers.py --device "${device%:*}" \
        --output "$numbers/trl_trainers.json" --rounds 1 "${trl[@]}"
fi
steps=20 job "A loss scale that overflows" 60 --model_dtype float16 --init_loss_scale 16777216
job "The teacher in the machine's memory" 60 --model_dtype float16 --routing native --offload_teacher_to_cpu
has accelerate && [ "$device" != cpu ] &&
    job "The teacher spread over devices" 60 --model_dtype float16 --routing native --teacher_device_map auto
run "A step beside the floor" 360 step_floor "${both[@]}" --rounds "$rounds" "${floor[@]}"
run "Growth" 240 growth "${both[@]}" --rounds "$rounds" --times "${growth[@]}"
run "The guards" 180 guard_cost "${both[@]}" "${guards[@]}"
measure "The memory plan" 240 "$python" benchmarks/memory_plan.py --device "$device" "${rest[@]}" \
    --output "$numbers/memory_plan.json"
rm -f "$numbers/errors.txt"
echo "$page"
exit "$code"
