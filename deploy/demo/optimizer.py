"""Muon for matrices, Adam for the rest, over one flat buffer of gradients that ranks sum in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploy.demo.train_model import NanoModel

MATRICES = ("q", "k", "v", "o", "gate", "up", "down", "w1", "w3", "w2")
INDEX = ("index_q", "index_k", "index_q_norm", "index_k_norm")
MUON_LR, MUON_DECAY = 0.012, 0.05
# Learning rates of Adam, by kind of parameter.
ADAM_LR = {"embedding": 0.08, "head": 0.005, "norm": 0.005, "router": 0.002, "index": 1e-3}
# Coefficients of the quintic that draws singular values to 1 (Keller Jordan's Muon).
_QUINTIC = (3.4445, -4.7750, 2.0315)


def kind_of(name: str) -> str:
    """Which rule trains the parameter `name` of a NanoModel: "muon" or a key of ADAM_LR."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf in MATRICES:
        return "muon"
    if leaf in INDEX:
        return "index"
    return "norm" if leaf.endswith("norm") else leaf


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by Newton-Schulz iteration. matrices: [count, rows, columns]."""
    a, b, c = _QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    turned = x.shape[1] > x.shape[2]
    if turned:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.02 + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = (x.mT if turned else x).to(matrices.dtype)
    return result


class Muon:
    """Momentum, orthogonalised per matrix; matrices of one shape are taken together."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(tuple(parameter.shape[-2:]), []).append(parameter)
        self._groups = list(shapes.values())
        self.momentum = [self._stack([parameter.data for parameter in group]).zero_() for group in self._groups]

    @staticmethod
    def _stack(tensors: Sequence[Tensor]) -> Tensor:
        """[matrices, rows, columns], a copy."""
        return torch.cat([tensor.view(-1, *tensor.shape[-2:]) for tensor in tensors])

    @torch.no_grad()
    def step(self, lr: float, momentum: float, decay: float) -> None:
        for group, buffer in zip(self._groups, self.momentum, strict=True):
            gradient = self._stack([_gradient(parameter) for parameter in group])
            buffer.lerp_(gradient, 1 - momentum)
            update = orthogonalise(gradient.lerp(buffer, momentum))
            rows, columns = update.shape[1:]
            sizes = [parameter.numel() // (rows * columns) for parameter in group]
            parts = [part.view_as(p) for part, p in zip(update.split(sizes), group, strict=True)]
            torch._foreach_mul_(list(group), 1 - lr * decay)
            torch._foreach_add_(list(group), parts, alpha=-lr * max(1.0, rows / columns) ** 0.5)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "gradients live in the flat buffer"
    return parameter.grad


class Optimizer:
    """All parameters of a model. gradients: float32, flat, what ranks sum; its tail holds the experts' loads."""

    def __init__(self, model: NanoModel, num_loads: int) -> None:
        named = list(model.named_parameters())
        total = sum(parameter.numel() for _, parameter in named)
        device = named[0][1].device
        # The indexers' last: they are clipped apart, else their loss would set the step of everything else.
        named.sort(key=lambda item: kind_of(item[0]) == "index")
        self.gradients = torch.zeros(total + num_loads, device=device)
        self._index_start = sum(p.numel() for name, p in named if kind_of(name) != "index")
        self._total, start = total, 0
        kinds: dict[str, list[nn.Parameter]] = {}
        for name, parameter in named:
            parameter.grad = self.gradients[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
            kinds.setdefault(kind_of(name), []).append(parameter)
        self.muon = Muon(kinds.pop("muon"))
        groups = [{"params": kinds[kind], "lr": ADAM_LR[kind], "kind": kind} for kind in kinds]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda")

    def zero(self) -> None:
        self.gradients.zero_()

    @property
    def loads(self) -> Tensor:
        """The tail of the flat buffer, for the experts' loads."""
        return self.gradients[self._total :]

    def clip(self, limit: float = 1.0) -> tuple[Tensor, Tensor]:
        """Scale the gradients to a norm of at most `limit`, the indexers' apart. Returns both norms before that."""
        parts = (self.gradients[: self._index_start], self.gradients[self._index_start : self._total])
        norms = tuple(part.norm() for part in parts)
        for part, norm in zip(parts, norms, strict=True):
            part.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norms[0], norms[1]

    def step(self, scale: float, index_scale: float, momentum: float) -> None:
        """scale, index_scale: factors of the learning rates."""
        for group in self.adam.param_groups:
            group["lr"] = ADAM_LR[group["kind"]] * (index_scale if group["kind"] == "index" else scale)
        self.adam.step()
        self.muon.step(MUON_LR * scale, momentum, MUON_DECAY * scale)

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "muon": self.muon.momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        for mine, stored in zip(self.muon.momentum, state["muon"], strict=True):
            mine.copy_(stored)
