"""Parameter groups, learning rates and LARS: pure functions and one optimizer.

Works alone, with torch.
"""

import math

import torch
from torch import Tensor, nn


def adamw(model: nn.Module, lr: float, weight_decay: float, device: str = "cpu") -> torch.optim.Optimizer:
    """AdamW for pre-training as in MAE, fused where ``device`` allows it.

    Biases, norms, positions and tokens (CLS, mask) are not decayed; MAE decays the tokens.
    """
    decayed = [p for name, p in model.named_parameters() if decays(name, p)]
    others = [p for name, p in model.named_parameters() if not decays(name, p)]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=device in ("cuda", "cpu"))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter: only to weight matrices."""
    return parameter.ndim > 1 and not name.endswith(("positions", "registers"))


def layer_groups(model: nn.Module, layer_decay: float, weight_decay: float) -> list[dict]:
    """Parameter groups of a model on an ``encoder`` (an ``smae.SMAE``) with a learning rate for each layer.

    From the top down, each layer's learning rate is ``layer_decay`` times that of the layer above;
    the factor of a group is its ``scale``, 1 for the top. As in BEiT and MAE, the embedding is
    layer 0, block i is layer i (from 1), the encoder's final norm and all that is not the encoder are
    the last layer. Biases, norms, positions and tokens are not decayed. Frozen parameters are left out.
    """
    depth, groups = len(model.encoder.blocks), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer(name, depth)
        decay = weight_decay if decays(name, parameter) else 0.0
        group = dict(params=[], weight_decay=decay, scale=layer_decay ** (depth + 1 - layer))
        groups.setdefault((layer, decay), group)["params"].append(parameter)
    return list(groups.values())


def _layer(name: str, depth: int) -> int:
    """The layer, 0 to depth + 1, of the parameter ``name`` of a model on an encoder."""
    inside = name.partition("encoder.")[2]
    if not inside or inside.startswith("norm."):
        return depth + 1
    part, *rest = inside.split(".")
    return int(rest[0]) + 1 if part == "blocks" else 0


SCHEDULES = ("cosine", "linear", "steps")


def learning_rate(
    step: int, steps: int, warmup: float, peak: float, least: float = 0.0, schedule: str = "cosine"
) -> float:
    """The learning rate at ``step``, counted from 0.

    Rises linearly to ``peak`` over ``warmup`` steps, then falls to ``least`` at ``steps``: by half a
    "cosine"; in a straight line ("linear", the polynomial decay of ADE20K's recipes); or in "steps", to
    1/10 after 8/9 of all steps and 1/100 after 26/27 (ViTDet on COCO).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "steps":
        return peak * 0.1 ** sum(step >= part * steps for part in (8 / 9, 26 / 27))
    done = (step - warmup) / max(1, steps - warmup)
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return least + (peak - least) * left


class LARS(torch.optim.Optimizer):
    """SGD with momentum; the step of each matrix is scaled to the norm of its weights.

    LARS (You et al., 2017, arXiv 1708.03888). As in the linear probes of MoCo v3 and MAE, vectors
    (biases) are neither scaled nor decayed.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    ours, theirs = p.norm(), update.norm()
                    update = update * torch.where(ours * theirs > 0, group["trust"] * ours / theirs, 1.0)
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.mul_(group["momentum"]).add_(update)
                p.sub_(group["lr"] * momentum)
