#!/usr/bin/env bash
# The paper's recipe for Qwen2.5-7B-Instruct, from raw data to table, on one node of 8 GPUs of 80 GB. Not run by us.
# R1's thoughts are kept: the warm-up, ten epochs of it, is there to teach long chains of reasoning. Responses: up to 16,384 tokens.
#
#     export OPENAI_API_KEY=...
#     ENDPOINT=https://api.deepseek.com/v1 STRONG=deepseek-reasoner OPENR1=openr1.parquet bash runs/paper_7b.sh
#
# Expected (estimates: `python train.py --model Qwen2.5-7B-Instruct --plan --gpus 8`): 41 hours of training at responses of 4,096
# tokens on average (`--mean_response 2048`: 27), 73 GB of each GPU. 46 of a rank's 192 responses of the full length fit into its
# cache at once, the others wait. What the paper states: about 17 hours on 4 nodes of 8 GPUs, SFT and RL together [app E], with
# responses of 2.7K tokens at the start and 5.0K at the end [fig 3]; which GPUs, it does not say.
# Beside it the benchmarks, 2 x 8,984 responses, whose time is not estimated. Disk: model 15 GB twice, checkpoints of 92 GB each, of
# which three are there while the third is written, up to four times the best weights of the warm-up of 31 GB each, data 2 GB.
# Strategies: 8,500 problems x (5 candidates + 1 call for their scores); `python strategy.py --dry_run` says what they cost, their
# hours are the server's.
# Any variable can be set from outside (runs/recipe.sh says what they are): TRAIN_SOURCE and STRATEGY_FLAGS take the place of
# OPENR1, and of ENDPOINT and STRONG.
set -euo pipefail
export WORK=${WORK:-runs/paper_7b} MODEL=${MODEL:-Qwen2.5-7B-Instruct}
export BENCH_SOURCE=${BENCH_SOURCE:-hub}
export TRAIN_COMMAND=${TRAIN_COMMAND:-openr1}
export TRAIN_SOURCE=${TRAIN_SOURCE:-${OPENR1:?the parquet file of LUFFY\'s OpenR1-Math}}
export TRAIN_FLAGS=${TRAIN_FLAGS:---count 8500 --seed 0 --need_solution --think keep}
strong='the name of the strong model there' server='an OpenAI-compatible server, up to /v1'
export STRATEGY_FLAGS=${STRATEGY_FLAGS:---endpoint ${ENDPOINT:?$server} --model ${STRONG:?$strong} --workers 32}
export LAUNCH=${LAUNCH:-torchrun --nproc_per_node=8 --}
export RUN_FLAGS=${RUN_FLAGS:---eval_every 0}
export EVAL_FLAGS=${EVAL_FLAGS:---dtype bfloat16 --max_rows 256}
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
