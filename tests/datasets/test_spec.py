"""Which image is where, and what makes two sets different."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from var_deploy.datasets.spec import SetSpec
from var_deploy.errors import UsageError
from var_deploy.sampling import Sampling

NewSpec = Callable[..., SetSpec]


def test_shards_hold_every_image_once(spec: SetSpec) -> None:
    assert (spec.images, spec.shards) == (15, 4)
    assert [n for s in range(spec.shards) for n in spec.numbers(s)] == list(range(15))
    assert [len(spec.numbers(s)) for s in range(spec.shards)] == [4, 4, 4, 3]


def test_classes_come_in_equal_parts(spec: SetSpec) -> None:
    labels = [spec.label(n) for n in range(spec.images)]
    assert Counter(labels) == dict.fromkeys(range(5), 3)
    for count in range(1, 16):
        parts = Counter(labels[:count])
        assert max(parts.values()) - min(parts[c] for c in range(5)) <= 1


def test_a_model_without_classes(new_spec: NewSpec) -> None:
    spec = new_spec(classes=0)
    assert spec.images == 3
    assert spec.label(2) is None


def test_a_label_does_not_move_with_the_size_of_a_shard(new_spec: NewSpec) -> None:
    a, b = new_spec(shard_size=1), new_spec(shard_size=100)
    assert [a.label(n) for n in range(15)] == [b.label(n) for n in range(15)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shard_size": 0}, "shard_size must be a whole number above 0, found 0"),
        ({"per_class": -1}, "per_class must be a whole number above 0, found -1"),
        ({"per_class": True}, "per_class must be a whole number above 0, found True"),
        ({"seed": -1}, "seed must lie between"),
        ({"per_class": 10**9}, "ask for fewer images or larger shards"),
        ({"per_class": 10**6, "shard_size": 1}, "ask for fewer images or larger shards"),
    ],
)
def test_values_out_of_range(new_spec: NewSpec, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        new_spec(**changes)


@pytest.mark.parametrize("cfg", [4.0, (0.0, 1.5, 3.0)])
def test_as_json_and_back(new_spec: NewSpec, cfg: Any) -> None:
    spec = new_spec(sampling=Sampling(cfg=cfg), seed=2**64 - 1)
    assert SetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_prompts_take_turns(new_prompt_spec: NewSpec) -> None:
    spec = new_prompt_spec()
    prompts = ["a red fox", "the sea", "狐狸"]
    assert (spec.images, spec.shards, spec.negative) == (6, 2, "fog")
    assert [spec.prompt(n) for n in range(6)] == prompts * 2
    assert SetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    with pytest.raises(UsageError, match="per_prompt must be a whole number above 0, found 0"):
        new_prompt_spec(per_class=0)


def test_a_set_of_classes_is_written_as_it_was(spec: SetSpec) -> None:
    """Older versions read it, and compare all of it."""
    assert list(spec.to_json()) == [
        *("bundle", "precision", "backend", "layout", "sampling", "seed", "classes", "per_class"),
        *("shard_size", "format"),
    ]


def test_prompts_that_are_not_those_of_the_hash(new_prompt_spec: NewSpec) -> None:
    data = new_prompt_spec().to_json()
    data["prompts"]["texts"] = ["another"] * 3
    with pytest.raises(ValueError, match="do not match their hash"):
        SetSpec.from_json(data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"seed": 1}, ["seed is 1 and not 9"]),
        ({"sampling": Sampling(cfg=3.0)}, ["cfg is 3 and not 2"]),
        ({"precision": "int8", "per_class": 4}, ["precision is int8 and not fp32"]),
        ({"bundle": "cd" * 32}, [f"bundle is {'cd' * 6} and not {'ab' * 6}"]),
    ],
)
def test_differences(new_spec: NewSpec, changes: dict[str, Any], words: list[str]) -> None:
    found = new_spec().differences(new_spec(**changes))
    assert len(found) == len(changes)
    assert [word for word in words if word not in found] == []
