"""The classifier of pocket's ten classes, which evaluates the images of a deployed pocket.

`verify` counts with it how many images of an int8 bundle show their class, and takes the Fréchet
distance between its features. `tools/pocket` trains it and evaluates pocket with it.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from var_deploy.errors import CheckpointError, one_line
from var_deploy.export.pocket.model import CLASS_NAMES

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]

CLASSIFIER_FILE = Path(__file__).parent / "classifier.safetensors"


class PocketClassifier(nn.Module):
    """Classifies a picture from 32×32 pixels, where sharpness no longer shows."""

    def __init__(self, classes: int = len(CLASS_NAMES), width: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, b) for b in widths[1:])
        self.hidden = nn.Linear(widths[-1] * 4, 4 * width)  # a 2×2 map of features
        self.head = nn.Linear(4 * width, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Pooled pictures [B, 3, 32, 32] in [0, 1] → features [B, F]."""
        x = 2 * x - 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        out: Tensor = F.silu(self.hidden(F.avg_pool2d(x, 2).flatten(1)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Pooled pictures [B, 3, 32, 32] in [0, 1] → logits [B, classes]."""
        out: Tensor = self.head(self.embed(x))
        return out

    @torch.no_grad()
    def features(self, images: Images) -> NDArray[np.float32]:
        """Pictures uint8 [N, 64, 64, 3] → activations before the last layer, float32 [N, F]."""
        parts = [self.embed(pool(part)) for part in batches(images)]
        return torch.cat(parts).numpy()

    def predict(self, images: Images) -> Labels:
        """Pictures uint8 [N, 64, 64, 3] → labels int64 [N]."""
        with torch.no_grad():
            logits = self.head(torch.from_numpy(self.features(images)))
        labels: Labels = logits.argmax(dim=1).numpy()
        return labels


def pool(images: Images) -> Tensor:
    """Pictures uint8 [B, 64, 64, 3] → float [B, 3, 32, 32] in [0, 1], averaged over 2×2 pixels."""
    return F.avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, 2)


def batches(images: Images, size: int = 250) -> list[Images]:
    return [images[first : first + size] for first in range(0, len(images), size)]


def load_classifier(path: Path = CLASSIFIER_FILE) -> PocketClassifier:
    """Load the weights that ship with the package: stored in fp16, computed in fp32.

    Raises CheckpointError where the file is missing or holds other weights.
    """
    classifier = PocketClassifier()
    try:
        classifier.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        why = f"{path} is not pocket's classifier ({one_line(error)})"
        raise CheckpointError(f"{why}; make train makes it") from None
    return classifier.eval().requires_grad_(False)


def accuracy(classifier: PocketClassifier, images: Images, labels: Labels) -> float:
    """Return the share of the pictures that the classifier names correctly."""
    return float((classifier.predict(images) == labels).mean())
