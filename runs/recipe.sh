#!/usr/bin/env bash
# From raw data to table, for the variables that runs/paper_7b.sh, paper_1p5b.sh or smoke.sh set: benchmarks and training data,
# strategies, SFT warm-up and SGPO, evaluation, table. Every step can be cut off: the same command goes on from there, and a step
# that is finished is passed over. Not meant to be run by itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

needed="WORK MODEL BENCH_SOURCE TRAIN_COMMAND TRAIN_SOURCE TRAIN_FLAGS STRATEGY_FLAGS LAUNCH RUN_FLAGS EVAL_FLAGS"
for name in $needed; do
    [ -n "${!name+set}" ] || { echo "runs/recipe.sh: the variable $name is not set; start runs/paper_7b.sh or its like" >&2; exit 2; }
done
PYTHON=${PYTHON:-python}
bench=$WORK/bench train=$WORK/train/${TRAIN_PART:-train}.jsonl strategies=$WORK/strategies.jsonl

say() { printf '\n== %s\n' "$*"; }

say "1/5 benchmarks"
if [ "$BENCH_SOURCE" = none ]; then
    echo "none: $EVAL_FILES"
elif [ ! -e "$bench/manifest.json" ]; then
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
else
    # rows that got no strategy are reported and make the exit status 1; the others are there
    $PYTHON strategy.py --data "$train" --out "$strategies" $STRATEGY_FLAGS || [ $? -eq 1 ] && [ -s "$strategies" ]
    $PYTHON strategy.py --report "$strategies" --samples 3
fi

say "4/5 warm-up and SGPO"
$LAUNCH train.py --model "$MODEL" --data "$strategies" --out "$WORK/run" --resume $RUN_FLAGS

say "5/5 evaluation"
[ "$BENCH_SOURCE" = none ] && what=(--data $EVAL_FILES) || what=(--benchmarks "$bench")
for side in base trained; do
    [ $side = base ] && folder=$MODEL || folder=$WORK/run/model
    [ -e "$WORK/$side.json" ] || $LAUNCH eval.py --model "$folder" "${what[@]}" --out "$WORK/$side.json" $EVAL_FLAGS
done
$PYTHON eval.py --compare "$WORK/base.json" "$WORK/trained.json"
[ "$BENCH_SOURCE" = none ] || $PYTHON eval.py --table "$WORK/base.json" "$WORK/trained.json"
