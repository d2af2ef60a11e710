"""A training stage that can be stopped and goes on where it was, step for step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tools.pocket.optimizers import Optimizers

Log = Callable[[str], None]
SAVE_EVERY = 100  # steps


class Step(Protocol):
    """Takes optimizer step number `step` and returns what is logged, by name."""

    def __call__(self, step: int) -> dict[str, float]: ...


def run_steps(
    name: str,
    steps: int,
    take: Step,
    parts: dict[str, nn.Module],
    optimizers: Optimizers,
    log: Log,
    checkpoint: Path | None = None,
) -> None:
    """Take the steps of a stage, and save its whole state to `checkpoint` every SAVE_EVERY.

    Where that file is there already, the stage goes on from it: `take` must depend on the number
    of its step, the parts and the optimizers alone. Processor seconds are logged, which other
    programs on the machine do not change as they change the time.
    """
    first, spent = 0, 0.0
    if checkpoint is not None and checkpoint.is_file():
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(state["parts"][key])
        for optimizer, saved in zip(optimizers.parts, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, spent = int(state["step"]), float(state["spent"])
        optimizers.done = first
        log(f"{name} goes on from step {first}")
    start, means = time.process_time() - spent, dict[str, float]()
    for step in range(first, steps):
        values = take(step)
        for key, value in values.items():
            means[key] = value if key not in means else 0.97 * means[key] + 0.03 * value
        last = step == steps - 1
        if step % 50 == 0 or last:
            shown = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
            log(f"{name} {step:5d}/{steps}  {shown}  {time.process_time() - start:.0f} s of CPU")
        if checkpoint is not None and (last or (step + 1) % SAVE_EVERY == 0):
            state = {
                "parts": {key: part.state_dict() for key, part in parts.items()},
                "optimizers": [optimizer.state_dict() for optimizer in optimizers.parts],
                "step": step + 1,
                "spent": time.process_time() - start,
            }
            new = checkpoint.with_suffix(".new")
            torch.save(state, new)
            os.replace(new, checkpoint)


def decibels(mean_square: float) -> float:
    """Return the peak signal-to-noise ratio of an error on pictures in [-1, 1]."""
    return -10 * math.log10(max(mean_square, 1e-12) / 4)
