#!/usr/bin/env bash
# All that one GPU can say, in one command, without the network and in at most eight minutes:
#
#     bash tools/gpu_check.sh OUT                              every part, on CUDA
#     bash tools/gpu_check.sh OUT --parts "tests step"         these
#     bash tools/gpu_check.sh OUT --device cpu                 the same at toy size, anywhere: does it run
#
# Each part has a time limit, a log OUT/PART.txt and a row in OUT/rows.md, which is written when it ends. If one fails, the others
# go on. What a part measures is in its log and in OUT/PART.json (tests, run and torchrun have none).
#
#     tests      the tests for a GPU                            step      one 1.5B step: memory against the plan, sampler against
#     run        the default run                                          trainer, time by kernel (tools/gpu_step.py)
#     float16    its first steps in float16: the scale, sampler against trainer (first_logprob_error* in its metrics.jsonl)
#     lora       a step of 7B with adapters, as on a card of 80 GB
#     torchrun   one under torchrun, cut off and resumed        update, sampler, tail, head, grpo   bench.py with its rivals
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:?usage: bash tools/gpu_check.sh OUT [--device cuda|cpu] [--parts "..."]} && shift
DEVICE=cuda PARTS="tests run float16 torchrun step lora update sampler tail head grpo" IN_ALL=${IN_ALL:-480}
while [ $# -gt 0 ]; do
    case $1 in
        --device) DEVICE=${2:?} ;;
        --parts) PARTS=${2:?} ;;
        *) echo "tools/gpu_check.sh: unknown argument $1" >&2; exit 2 ;;
    esac
    shift 2
done
PYTHON=${PYTHON:-$(command -v python || command -v python3)} QUICK="" STEPS="" SHORT="--steps 12" BENCH="--device $DEVICE --repeats 2"
if [ "$DEVICE" = cpu ]; then
    QUICK=--quick STEPS="--steps 2 --problems_per_step 2 --eval_limit 2" SHORT="--steps 3 --problems_per_step 2 --eval_limit 2"
    BENCH="--device cpu --repeats 1 --threads 1"
fi
export HF_HUB_OFFLINE=1
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
begin=$(date +%s) failed=0

about='import sys, torch, transformers, checkpoint
device = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "cpu"
print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, commit {checkpoint.code_commit()}")'
{ echo "$($PYTHON -c "$about" $DEVICE 2>&1 | tail -n 1); bash tools/gpu_check.sh, $(date -u +%Y-%m-%d)"; echo
  echo "| part | seconds | result | command |"; echo "|---|---|---|---|"; } > "$OUT/rows.md"

part() { # name, time limit in seconds, command
    local name=$1 limit=$2 start now status=0 result; shift 2
    [[ " $PARTS " == *" $name "* ]] || return 0
    start=$(date +%s) now=$((IN_ALL - (start - begin)))
    if [ $now -lt 10 ]; then
        status=1 result="not run: the $IN_ALL s are used up"
    else
        timeout --kill-after=10 $((limit < now ? limit : now)) "$@" > "$OUT/$name.txt" 2>&1 || status=$?
        case $status in
            0) result=ok ;;
            124 | 137) result="cut off" ;;
            *) result="failed ($status)" ;;
        esac
        result="$result: $(tr '\r' '\n' < "$OUT/$name.txt" | grep -v '^\s*$' | tail -n 1 | cut -c 1-150 | tr '|' '/')"
    fi
    [ "$status" = 0 ] || failed=1
    echo "| $name | $(($(date +%s) - start)) | $result | \`$(echo "$*" | sed "s|$OUT|OUT|g" | cut -c 1-200)\` |" | tee -a "$OUT/rows.md"
}

resumed() { # a run under torchrun that loses its end, and goes on
    local flags="--device $DEVICE --checkpoint_minutes 0 --eval_every 0 --no-eval_guided $SHORT" run="$OUT/torchrun"
    rm -rf "$run"
    $PYTHON -m torch.distributed.run --standalone --nproc_per_node=1 train.py $flags --out "$run" || return
    cp "$run/metrics.jsonl" "$OUT/torchrun-whole.jsonl"
    rm -r "$run/model" "$(ls -d "$run"/checkpoints/step-* | tail -n 1)"
    $PYTHON -m torch.distributed.run --standalone --nproc_per_node=1 train.py --resume --out "$run" || return
    if cmp -s <(steps "$run/metrics.jsonl") <(steps "$OUT/torchrun-whole.jsonl"); then
        echo "the resumed run equals the whole one, losses to the letter"
    else # on a GPU some sums have no fixed order
        echo "the resumed run's losses differ: $(steps "$run/metrics.jsonl" | tail -n 1), $(steps "$OUT/torchrun-whole.jsonl" | tail -n 1)"
        [ "$DEVICE" = cuda ]
    fi
}
steps() { grep '"stage": "sgpo"' "$1" | grep -o '"loss": [^,]*'; }
export -f resumed steps; export OUT DEVICE SHORT PYTHON

part tests 110 $PYTHON -m pytest -q -o addopts= -k "gpu or paged" test_sgpo.py tests/test_gpu.py
part run 60 $PYTHON train.py --device $DEVICE $STEPS --out "$OUT/run-$(date +%H%M%S)"
part float16 40 $PYTHON train.py --device $DEVICE --dtype float16 --no-eval_guided $SHORT --out "$OUT/float16-$(date +%H%M%S)"
part torchrun 80 bash -c resumed
part step 120 $PYTHON tools/gpu_step.py --out "$OUT/step.json" --device $DEVICE $QUICK
part lora 80 $PYTHON tools/gpu_step.py --out "$OUT/lora.json" --lora --device $DEVICE $QUICK
part update 70 $PYTHON tools/bench.py --out "$OUT/update.json" --only update $BENCH $QUICK
part sampler 75 $PYTHON tools/bench.py --out "$OUT/sampler.json" --only sampler --workloads uniform $BENCH $QUICK
part tail 90 $PYTHON tools/bench.py --out "$OUT/tail.json" --only sampler --workloads "long tail" $BENCH --repeats 1 $QUICK
part head 50 $PYTHON tools/bench.py --out "$OUT/head.json" --only head $BENCH --repeats 1 $QUICK
part grpo 90 $PYTHON tools/bench.py --out "$OUT/grpo.json" --only step $BENCH $QUICK
echo "written: $OUT/rows.md"
exit $failed
