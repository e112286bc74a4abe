#!/usr/bin/env bash
# From raw data to table: benchmarks and training data, strategies, SFT warm-up and SGPO, evaluation, table. Start
# runs/paper_7b.sh, paper_1p5b.sh or smoke.sh, which set the variables. A run that was cut off goes on with the same command, and
# passes over every step that is finished. Paths are taken from the repository's root.
#
#   BENCH_SOURCE    hub, a folder with the benchmarks' files, or none: then EVAL_FILES are what is evaluated
#   TRAIN_COMMAND   data/prepare.py's command for TRAIN_SOURCE, with TRAIN_FLAGS; TRAIN_PART names the file that it writes if
#                   that is not train.jsonl (mawps: singleop)
#   STRATEGY_FLAGS  strategy.py's, or none: the rows have strategies
#   LAUNCH          what starts train.py and eval.py. On several nodes something that starts all of them, such as
#                   "srun torchrun ... --": this script itself runs once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

needed="WORK MODEL BENCH_SOURCE TRAIN_COMMAND TRAIN_SOURCE TRAIN_FLAGS STRATEGY_FLAGS LAUNCH RUN_FLAGS EVAL_FLAGS"
[ "${BENCH_SOURCE:-}" != none ] || needed="$needed EVAL_FILES"
for name in $needed; do
    [ -n "${!name+set}" ] || { echo "runs/recipe.sh: the variable $name is not set; start runs/paper_7b.sh or its like" >&2; exit 2; }
done
PYTHON=${PYTHON:-python}
bench=$WORK/bench train=$WORK/train/${TRAIN_PART:-train}.jsonl strategies=$WORK/strategies.jsonl

say() { printf '\n== %s\n' "$*"; }

# What the files in WORK are made from. Models, training, answers and responses are checked by the programs themselves.
settings=$(for name in BENCH_SOURCE EVAL_FILES TRAIN_COMMAND TRAIN_SOURCE TRAIN_FLAGS TRAIN_PART; do echo "$name=${!name:-}"; done)
if [ ! -e "$WORK/settings" ]; then
    mkdir -p "$WORK" && echo "$settings" > "$WORK/settings"
elif ! changes=$(diff "$WORK/settings" - <<< "$settings"); then
    printf 'runs/recipe.sh: %s was made with other settings; name another WORK, or remove it\n%s\n' "$WORK" "$changes" >&2
    exit 2
fi

say "1/5 benchmarks"
if [ "$BENCH_SOURCE" = none ]; then
    echo "none: $EVAL_FILES"
else # passes over those that are there
    $PYTHON data/prepare.py benchmarks --source "$BENCH_SOURCE" --out "$bench"
fi

say "2/5 training data"
if [ ! -e "$train" ]; then
    against=()
    [ "$BENCH_SOURCE" = none ] && against=(--against $EVAL_FILES) || against=(--against "$bench"/*.jsonl)
    # TRAIN_FLAGS is several words on purpose, as the other *_FLAGS are
    $PYTHON data/prepare.py "$TRAIN_COMMAND" --source "$TRAIN_SOURCE" --out "$WORK/train" "${against[@]}" $TRAIN_FLAGS
fi

say "3/5 strategies"
if [ "$STRATEGY_FLAGS" = none ]; then
    strategies=$train # the rows have theirs
elif [ -e "$WORK/run/checkpoints" ]; then
    echo "$strategies: training goes on with what it began with; rows that failed are not asked for again"
else
    status=0
    $PYTHON strategy.py --data "$train" --out "$strategies" $STRATEGY_FLAGS || status=$?
    # 3: some rows got no strategy and were reported; the others are there
    [ "$status" = 0 ] || [ "$status" = 3 ] || exit "$status"
    $PYTHON strategy.py --report "$strategies" --samples 3
    if [ $(($(wc -l < "$strategies") * 2)) -lt "$(wc -l < "$train")" ]; then
        echo "runs/recipe.sh: fewer than half of the rows got a strategy, the reasons are above; the same command asks again" >&2
        exit 1
    fi
fi

say "4/5 warm-up and SGPO"
$LAUNCH train.py --model "$MODEL" --data "$strategies" --out "$WORK/run" --resume $RUN_FLAGS
if [ ! -e "$WORK/run/model" ]; then
    echo "runs/recipe.sh: training was stopped before its end; the same command goes on" >&2
    exit 1
fi

say "5/5 evaluation"
[ "$BENCH_SOURCE" = none ] && what=(--data $EVAL_FILES) || what=(--benchmarks "$bench")
for side in base trained; do
    [ $side = base ] && folder=$MODEL || folder=$WORK/run/model
    [ -e "$WORK/$side.json" ] || $LAUNCH eval.py --model "$folder" "${what[@]}" --out "$WORK/$side.json" $EVAL_FLAGS
done
$PYTHON eval.py --compare "$WORK/base.json" "$WORK/trained.json"
[ "$BENCH_SOURCE" = none ] || $PYTHON eval.py --table "$WORK/base.json" "$WORK/trained.json"
