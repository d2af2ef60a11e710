"""Masks: by scale, by box, and the seam of pixels that are put back."""

from __future__ import annotations

import numpy as np
import pytest

from var_deploy.errors import UnchangedError, UsageError
from var_deploy.image.editing import Kept, blend, box_mask, feather, keep_masks
from var_deploy.image.pictures import read_edit
from var_deploy.spec import TokenizerSpec

PATCHES = (1, 2, 4)


def test_a_token_stays_while_at_most_half_of_its_cell_is_new() -> None:
    new = np.zeros((8, 8), np.bool_)
    new[:, :4] = True  # all of the left half
    new[:2, 4:6] = True  # all of one cell of scale 2, a quarter of one of scale 1
    new[4:6, 4] = True  # half of a cell of scale 2
    masks = keep_masks(new, PATCHES)
    found = [mask.reshape(p, p).tolist() for p, mask in zip(PATCHES, masks, strict=True)]
    assert found[0] == [[True]]
    assert found[1] == [[False, True], [False, True]]
    assert found[2] == [
        [False, False, False, True],
        [False, False, True, True],
        [False, False, True, True],
        [False, False, True, True],
    ]


def test_the_tone_stays_unless_all_is_new() -> None:
    new = np.ones((8, 8), np.bool_)
    assert not any(mask.any() for mask in keep_masks(new, PATCHES))
    new[7, 7] = False
    assert [int(mask.sum()) for mask in keep_masks(new, PATCHES)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("box", "most"), [((3, 3, 5, 5), "25%"), ((4, 4, 5, 6), "50%"), ((0, 0, 1, 1), "25%")]
)
def test_a_mask_that_changes_no_token_is_refused(box: tuple[int, ...], most: str) -> None:
    said = rf"stands for 2 × 2 pixels of the model's 8 × 8.*more than 50% .*at most {most} are"
    with pytest.raises(UnchangedError, match=said) as refused:
        keep_masks(box_mask(box, 8, 8), PATCHES)
    assert refused.value.exit_code == 1 and isinstance(refused.value, UsageError)
    assert not all(mask.all() for mask in keep_masks(box_mask((4, 4, 6, 6), 8, 8), PATCHES))


def test_sizes_that_do_not_divide() -> None:
    """Neighbouring cells of 3 share rows of 64: the middle one looks at rows 21 to 42."""
    new = np.zeros((64, 64), np.bool_)
    new[21:43] = True
    _, middle = keep_masks(new, (1, 3), 0.99)
    assert middle.reshape(3, 3).tolist() == [[True] * 3, [False] * 3, [True] * 3]


def test_rows_of_what_is_kept() -> None:
    tokens = (np.arange(3).reshape(3, 1), np.arange(12).reshape(3, 4))
    part = Kept(masks=tuple(t > 1 for t in tokens), tokens=tokens).rows([2, 0, 0])
    assert part.tokens[0].tolist() == [[2], [0], [0]]
    assert part.masks[1].tolist() == [[True] * 4, *[[False, False, True, True]] * 2]


def test_a_box() -> None:
    inside = box_mask((1, 2, 4, 3), height=5, width=6)
    assert inside.shape == (5, 6) and inside.sum() == 3 and inside[2, 1:4].all()
    np.testing.assert_array_equal(box_mask((1, 2, 4, 3), 5, 6, outside=True), ~inside)


@pytest.mark.parametrize("box", [(0, 0, 7, 5), (-1, 0, 2, 2), (3, 0, 3, 2), (0, 4, 2, 2)])
def test_a_box_that_is_none(box: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"must lie in the image of 6 × 5.*found"):
        box_mask(box, height=5, width=6)
    with pytest.raises(UsageError, match="four whole numbers"):
        box_mask((0, 0, 1.5, 2), height=5, width=6)


def test_the_seam_lies_within_the_mask() -> None:
    mask = np.zeros((64, 64), np.bool_)
    mask[:, 20:] = True  # to the border, which is no seam
    weights = feather(mask, 2)
    assert weights.dtype == np.float32
    row = weights[0]
    assert not row[:20].any()
    np.testing.assert_allclose(row[20:24], [1 / 3, 2 / 3, 1, 1], atol=1e-6)
    assert (weights[:, 22:] == 1).all()


def test_pixels_outside_the_mask_are_put_back() -> None:
    old, new = np.full((64, 64, 3), 200, np.uint8), np.full((2, 64, 64, 3), 10, np.uint8)
    mask = box_mask((16, 16, 48, 48), 64, 64)
    mixed = blend(new, old, mask)
    assert mixed.shape == new.shape and mixed.dtype == np.uint8
    assert (mixed[:, ~mask] == 200).all()
    assert (mixed[:, 18:46, 18:46] == 10).all()
    assert 10 < mixed[0, 16, 30, 0] < 200


def test_a_picture_and_its_mask_become_an_edit_of_the_models_size() -> None:
    spec = TokenizerSpec(
        patch_nums=PATCHES, vocab_size=16, code_width=4, base_width=32, width_multipliers=(1, 2)
    )
    side = spec.image_side
    picture = np.random.RandomState(0).randint(0, 255, (side, side, 3)).astype(np.uint8)
    mask = box_mask((0, 0, side // 2, side), side, side)
    edit = read_edit(picture, mask, spec, outside=True, keep_pixels=True)
    np.testing.assert_array_equal(edit.pixels, picture[None])
    np.testing.assert_array_equal(edit.new, ~mask)
    tokens = [np.full((1, p * p), p) for p in PATCHES]
    kept = edit.kept(tokens)
    for found, wanted in zip(kept.masks, keep_masks(~mask, PATCHES), strict=True):
        np.testing.assert_array_equal(found, wanted[None])
    np.testing.assert_array_equal(kept.tokens[2], tokens[2])
    grey = np.full((2, side, side, 3), 128, np.uint8)
    np.testing.assert_array_equal(edit.finish(grey), blend(grey, picture, ~mask))
    plain = read_edit(picture, mask, spec)
    assert plain.finish(grey) is grey, "only what is asked for is put back"
    # one edit for several images, and beside images that keep nothing
    together = Kept.joined([kept.rows([0, 0]), Kept.nothing([p * p for p in PATCHES])])
    np.testing.assert_array_equal(together.masks[1][:2], kept.masks[1][[0, 0]])
    assert not together.masks[1][2].any() and together.tokens[2].shape == (3, 16)
    with pytest.raises(UnchangedError, match="too small"):
        read_edit(picture, box_mask((0, 0, 1, 1), side, side), spec)
