"""loss.py, weighting.py and strategy.py on a model of transformers: the loss of SGPO for one problem [eq 7], by hand.

    python examples/loss_on_transformers.py MODEL_FOLDER        (these three files need nothing else of the repository)
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import loss
import strategy
import weighting


def main(folder: str) -> float:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    problem = "A gano machine gets 5 and 4. What comes out?"
    steps = "Add the second input to the first.", "Increase the value by one.", "Keep the smaller of both."
    idea = "Work modulo ten: combine the inputs, change the value, then compare."
    hint = strategy.Strategy("gano machine", idea, steps)
    prompts = {"auto": strategy.auto_messages(problem), "guided": strategy.guided_messages(problem, hint)}
    ids = {
        side: tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for side, messages in prompts.items()
    }
    # what a sampler and a grader would bring: 8 responses alone with their rewards, 4 guided ones, the correct ones among them
    auto_rewards, guided_rewards = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]]), torch.tensor([[0.0, 1, 1, 1]])
    text = "gano add 5 4 = 9 , gano inc 9 = 0 , gano min 0 5 = 0 ."  # one of the 8, and to be short the target o+ too
    response = torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    def logits_of(side: str) -> torch.Tensor:
        """The logits that predict each token of the response: (M, V)."""
        row = torch.cat([torch.tensor(ids[side]), response])
        return model(row[None]).logits[0, len(ids[side]) - 1 : -1]

    unguided = logits_of("auto")
    logprobs = loss.token_logprobs(unguided, response)  # (M,)
    advantage = weighting.group_advantages(auto_rewards)[0, 0].expand_as(logprobs)  # A_i [eq 1]
    policy, _, _ = loss.policy_loss(logprobs, logprobs.detach(), advantage)  # the sampler's log-probs are these, at first
    with torch.no_grad():
        guided = logits_of("guided")
    d = loss.forward_kl(guided, unguided)  # d_t [eq 3]
    alpha = weighting.instance_weight(auto_rewards.mean(1), guided_rewards.mean(1))  # [eq 6]
    distillation = alpha[0] * (loss.kl_clip_mask(d) * d).mean()  # alpha(q) (1/|o+|) sum_t 1[d_t <= delta] d_t [eq 5]
    total = policy.mean() / 8 + distillation  # the other seven responses' terms are left out here
    total.backward()
    print(f"d_t {[round(x, 3) for x in d.tolist()]}  alpha {alpha.item():.3f}  loss {total.item():.4f}")
    return total.item()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
