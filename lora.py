"""LoRA: trainable low-rank adapters on the linear layers of a frozen decoder (arXiv 2106.09685), in explicit tensor code.

Each linear layer of every block computes W x + scale * B (A x). W (out, in) is the base model's and stays as it is; A (R, in)
and B (out, R) are trained. B starts at zero, so training starts from the base model. scale is alpha / R.
Imports no sibling: copy this file alone. It takes any module with its blocks in model.model.layers. Axes: R rank, T tokens.

    add_adapters(model, rank=16, alpha=32, dtype=torch.bfloat16)            once; without the next line they are undefined
    model.load_state_dict(dict(initial_adapters(model, generator)), strict=False)
    plain.load_state_dict(merge(model, {name: w.clone() for name, w in model.state_dict().items()}))
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """A frozen linear layer with adapters in fp32."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        outputs, inputs = base.weight.shape
        fp32 = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, **fp32))
        self.lora_B = nn.Parameter(torch.empty(outputs, rank, **fp32))

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        low = self.scale * F.linear(x, A)  # (..., T, R), scaled here, where it is smallest
        return F.linear(x, self.weight, self.bias) + F.linear(low, B)


def add_adapters(model: nn.Module, *, rank: int, alpha: float, dtype: torch.dtype) -> None:
    """Freeze the model, with its weights in `dtype`, and put adapters on every nn.Linear of its blocks: the projections of the
    attention and of the MLP, not the embedding and the head. Their values are undefined: see initial_adapters."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    for parent in [*model.model.layers.modules()]:
        for name, layer in [*parent.named_children()]:  # a list, because the children change
            if isinstance(layer, nn.Linear):
                setattr(parent, name, LoraLinear(layer, rank, alpha))


def initial_adapters(model: nn.Module, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """The name and first values of each adapter, whole and in fp32: A uniform within 1 / sqrt(in), as in PEFT; B zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_A"):
            bound = 1 / math.sqrt(parameter.shape[1])
            yield name, torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        elif name.endswith(".lora_B"):
            yield name, torch.zeros(parameter.shape)


@torch.no_grad()
def merge(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """All weights of the model by name, whole -> those of a plain model: W + scale * B A in place of W, A and B. The tensors W
    are changed: they must be copies. Product and sum are fp32, and rounded once, to W's dtype (see round_to)."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            W = weights[f"{name}.weight"]
            A, B = (weights.pop(f"{name}.{adapter}").float() for adapter in ("lora_A", "lora_B"))
            W.copy_(round_to(W.dtype, torch.addmm(W.float(), B, A, alpha=layer.scale)))  # in place: no third copy of the model
    return weights


def round_to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """x, fp32 and contiguous, in another dtype. bf16: up or down, with a fixed threshold between for each place in x. An update
    moves most numbers of W by less than half of the distance to the next bf16 number. Rounded to the nearest they would all
    stay. With thresholds that are spread evenly the right share of them moves. A bf16 number stays."""
    if dtype != torch.bfloat16:
        return x.to(dtype)
    # a bf16 number is the upper half of an fp32 one. A hash of the place (Knuth's, in int32, which wraps) is the same on all
    # ranks and in every step
    place = torch.arange(x.numel(), dtype=torch.int32, device=x.device).view(x.shape)
    threshold = (place * -1640531535 >> 13) & 0xFFFF
    rounded = (x.view(torch.int32) + threshold >> 16 << 16).view(torch.float32).to(dtype)
    return torch.where(x.isnan(), x.to(dtype), rounded)  # the sum of a nan's bits may wrap


def save_adapters(adapters: dict[str, Tensor], folder: Path, *, rank: int, alpha: float, base: str) -> None:
    """Write A and B of all layers, by name and whole, in PEFT's format into a new folder. `base` names their model."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    config |= {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none"}
    config["target_modules"] = sorted({name.split(".")[-2] for name in adapters})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {f"base_model.model.{name}.weight": tensor.contiguous() for name, tensor in adapters.items()}
    file = folder / "adapter_model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod((folder / "adapter_config.json").stat().st_mode)  # safetensors lets nobody else read its files
