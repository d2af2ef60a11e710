"""A small bundle and its pipeline, for the tests of the runtime.

The model is a small member of the family with random weights, whose images differ visibly from
label to label and from seed to seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from var_deploy.pipeline import Pipeline
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec

Images = NDArray[np.uint8]
ExportTo = Callable[..., Path]

LABELS = (3, 0, 4, 1, 2)
NAMES = ("star", "heart", "house", "tree", "fish")


@pytest.fixture(scope="session")
def random_model() -> Callable[[ModelSpec], Any]:
    """A loaded model of given sizes with seeded random weights."""

    def build(spec: ModelSpec) -> Any:
        from var_deploy.export.checkpoint.assemble import assemble, empty_modules
        from var_deploy.export.checkpoint.random_weights import RandomWeights

        drawn = (
            RandomWeights({key: tuple(p.shape) for key, p in module.named_parameters()}, 3)
            for module in empty_modules(spec)
        )
        defaults = Sampling(cfg=2.0, top_k=0, top_p=0.95)
        return assemble(spec, *drawn, labels=NAMES, defaults=defaults)

    return build


@pytest.fixture(scope="module")
def export_to(
    tmp_path_factory: pytest.TempPathFactory,
    family_member: Callable[..., ModelSpec],
    random_model: Callable[[ModelSpec], Any],
) -> ExportTo:
    """Exports the small model once for each set of options, and says where."""
    pytest.importorskip("torch")
    from var_deploy.export.bundle import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("bundles")
    model = random_model(family_member())
    made: dict[str, Path] = {}

    def export(**options: Any) -> Path:
        name = json.dumps(options, sort_keys=True)
        if name not in made:
            made[name] = folder / str(len(made))
            export_bundle(model, made[name], ExportOptions(**options))
        return made[name]

    return export


@pytest.fixture(scope="module")
def pipe(export_to: ExportTo) -> Iterator[Pipeline]:
    """Two images a launch, guidance on."""
    with Pipeline.load(export_to(batch=2), threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def expected(pipe: Pipeline) -> Images:
    """Five images of seed 7."""
    return pipe.generate(LABELS, seed=7)
