"""The drawn training set: reproducible picture by picture, varied, and ten different things."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tools.pocket.drawings import IMAGE_SIZE, draw, draw_set
from var_deploy.export.pocket.model import CLASS_NAMES

SEED = 31
COUNT = 100

Set = tuple[NDArray[np.uint8], NDArray[np.int64]]


@pytest.fixture(scope="module")
def drawn() -> Set:
    return draw_set(COUNT, SEED)


def test_shapes_and_labels(drawn: Set) -> None:
    images, labels = drawn
    assert images.shape == (COUNT, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(COUNT)]
    assert len(set(CLASS_NAMES)) == 10


def test_the_same_seed_draws_the_same_pictures(drawn: Set) -> None:
    images, labels = draw_set(COUNT, SEED)
    np.testing.assert_array_equal(images, drawn[0])
    np.testing.assert_array_equal(labels, drawn[1])


def test_a_smaller_set_is_the_beginning_of_a_larger_one(drawn: Set) -> None:
    np.testing.assert_array_equal(draw_set(7, SEED)[0], drawn[0][:7])


def test_any_picture_can_be_drawn_again_alone(drawn: Set) -> None:
    for i in (93, 4, 58):
        again = draw(int(drawn[1][i]), np.random.default_rng([SEED, i]))
        np.testing.assert_array_equal(again, drawn[0][i])


def test_a_picture_does_not_depend_on_the_labels_of_others(drawn: Set) -> None:
    labels = drawn[1][:20].copy()
    labels[5] = CLASS_NAMES.index("boat")
    images, returned = draw_set(20, SEED, labels=labels)
    np.testing.assert_array_equal(returned, labels)
    same = (images == drawn[0][:20]).all(axis=(1, 2, 3))
    assert np.flatnonzero(~same).tolist() == [5]


def test_another_seed_draws_other_pictures(drawn: Set) -> None:
    others = draw_set(COUNT, SEED + 1)[0]
    assert (others != drawn[0]).any(axis=(1, 2, 3)).all()


def test_the_global_random_state_is_neither_read_nor_moved(drawn: Set) -> None:
    np.random.seed(1)
    images, _ = draw_set(3, SEED)
    np.testing.assert_array_equal(images, drawn[0][:3])
    first = np.random.random()
    np.random.seed(1)
    assert np.random.random() == first


@pytest.mark.parametrize("label", range(10), ids=CLASS_NAMES)
def test_pictures_of_a_class_show_something_and_vary(label: int) -> None:
    images, _ = draw_set(30, SEED, labels=np.full(30, label))
    pixels = images.astype(np.float64)
    assert pixels.std(axis=(1, 2)).max(axis=1).min() > 12, "a picture is nearly of one colour"
    assert len(np.unique(images.reshape(30, -1), axis=0)) == 30
    # background (the four corners) and thing (the middle) both change from picture to picture
    corners = pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=1)
    middle = pixels[:, 28:36, 28:36].mean(axis=(1, 2))
    assert corners.std(axis=0).max() > 8
    assert middle.std(axis=0).max() > 5


def test_classes_differ_by_their_shapes_alone() -> None:
    """Neighbours in a space of outlines (no colours) are mostly of the same class."""

    def outlines(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        grey = images.astype(np.float64).mean(axis=3)
        across = np.abs(np.diff(grey, axis=2))[:, :-1]
        down = np.abs(np.diff(grey, axis=1))[:, :, :-1]
        edges = np.sqrt(np.hypot(across, down))[:, :60, :60]
        small = edges.reshape(-1, 10, 6, 10, 6).mean(axis=(2, 4)).reshape(len(images), -1)
        return (small - small.mean(axis=1, keepdims=True)) / small.std(axis=1, keepdims=True)

    (known, known_labels), (asked, asked_labels) = draw_set(1500, SEED), draw_set(200, SEED + 1)
    votes = known_labels[(outlines(asked) @ outlines(known).T).argsort(axis=1)[:, -7:]]
    named = np.array([np.bincount(v, minlength=10).argmax() for v in votes])
    shares = [(named[asked_labels == c] == c).mean() for c in range(10)]
    assert min(shares) >= 0.5, dict(zip(CLASS_NAMES, shares, strict=True))  # chance: 0.1


@pytest.mark.parametrize("label", [-1, 10])
def test_an_unknown_class_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=f"label {label} is not one of the 10 classes"):
        draw(label, np.random.default_rng(0))


def test_labels_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\), not \(3,\)"):
        draw_set(4, SEED, labels=np.zeros(3, np.int64))
