"""The Muon optimizer: momentum whose matrices are orthogonalised before each step
(Jordan et al., 2024).

It needs about half the steps of AdamW on the small networks here, which is what lets pocket train
on two cores. Matrices and convolution kernels (as [out, in·k·k]) take Muon; vectors and tables
take AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return about U·Vᵀ of the singular value decomposition, by a quintic Newton-Schulz
    iteration."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.T if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Steps scaled to the root mean square of an Adam step (Liu et al., arXiv 2502.16982), so that
    one learning rate serves both kinds of parameters."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(momentum, group["momentum"])
                update = orthogonalise(nesterov.flatten(1))
                scale = 0.2 * max(update.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def cosine_rate(step: int, steps: int, warm_up: int = 100) -> float:
    """Return the learning-rate factor: linear warm-up, then half a cosine down to a fiftieth."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(steps - warm_up, 1)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizers:
    """Muon for matrices and kernels, AdamW for the rest, on one cosine schedule."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        rate: float,
        steps: int,
        decay: float = 0.0,
        tables: tuple[str, ...] = ("emb",),
    ) -> None:
        """Names that contain one of `tables` are of tables, whatever their shape."""
        parameters = [(n, p) for n, p in named if p.requires_grad]
        self.all = [p for _, p in parameters]
        # tables and positions are looked up row by row: orthogonalising them mixes the rows
        flat = [(n, p) for n, p in parameters if p.ndim in (2, 4)]
        matrices = [p for n, p in flat if not any(part in n for part in tables)]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.all if id(p) not in chosen]
        self.rate, self.steps, self.done = rate, steps, 0
        self.parts: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=rate, weight_decay=decay),
            torch.optim.AdamW(rest, lr=rate / 2, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, loss: Tensor) -> None:
        factor = cosine_rate(self.done, self.steps)
        for parameter in self.all:
            parameter.grad = None
        loss.backward()
        for part, share in zip(self.parts, (1.0, 0.5), strict=True):
            for group in part.param_groups:
                group["lr"] = self.rate * share * factor
            part.step()
        self.done += 1
