#!/bin/sh
# In place of Python: the part head fails, training writes a log, and a resumed run's loss is $LOSS.
case "$*" in
    *"--only head"*) echo "no such kernel" >&2; exit 3 ;;
    *train.py*--resume*) sed -i "s/0.5/$LOSS/" "$OUT/torchrun/metrics.jsonl" ;;
    *train.py*)
        mkdir -p "$OUT/torchrun/model" "$OUT/torchrun/checkpoints/step-1"
        echo '{"stage": "sgpo", "loss": 0.5, "step": 1}' > "$OUT/torchrun/metrics.jsonl" ;;
esac
echo fine
