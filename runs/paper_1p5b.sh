#!/usr/bin/env bash
# The paper's recipe for Qwen2.5-1.5B-Instruct: runs/paper_7b.sh with another model. Not run by us.
#
# Expected (estimates: `python train.py --model Qwen2.5-1.5B-Instruct --plan --gpus 8`): 14 hours of training on 8 GPUs of 80 GB at
# responses of 4,096 tokens on average (`--mean_response 2048`: 8), 70 GB of each. The paper states no time for this model. Disk:
# model 3 GB twice, checkpoints of 19 GB each, of which three are there while the third is written, up to four times the best
# weights of the warm-up of 6 GB each. Benchmarks and strategies: as many as there.
set -euo pipefail
export WORK=${WORK:-runs/paper_1p5b} MODEL=${MODEL:-Qwen2.5-1.5B-Instruct}
source "$(dirname "${BASH_SOURCE[0]}")/paper_7b.sh"
