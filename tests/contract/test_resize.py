"""The resizing matrices equal PyTorch's interpolate."""

from __future__ import annotations

import numpy as np
import pytest

from var_deploy.image.resize import area_matrix, bicubic_matrix

torch = pytest.importorskip("torch")

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def _image(side: int) -> np.ndarray:
    return np.random.default_rng(side).standard_normal((2, side, side)).astype(np.float32)


@pytest.mark.parametrize("sides", [SIDES, SIDES_512])
def test_area_equals_torch(sides: tuple[int, ...]) -> None:
    image = _image(sides[-1])
    for side in sides:
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(image)[None], size=(side, side), mode="area"
        )[0].numpy()
        matrix = area_matrix(sides[-1], side)
        np.testing.assert_allclose(matrix @ image @ matrix.T, expected, atol=2e-6)


@pytest.mark.parametrize("sides", [SIDES, SIDES_512])
def test_bicubic_equals_torch(sides: tuple[int, ...]) -> None:
    for side in sides:
        image = _image(side)
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(image)[None], size=(sides[-1], sides[-1]), mode="bicubic"
        )[0].numpy()
        matrix = bicubic_matrix(side, sides[-1])
        np.testing.assert_allclose(matrix @ image @ matrix.T, expected, atol=5e-6)


@pytest.mark.parametrize("matrix", [area_matrix, bicubic_matrix])
def test_equal_sizes_are_the_identity(matrix: object) -> None:
    np.testing.assert_array_equal(matrix(16, 16), np.eye(16, dtype=np.float32))  # type: ignore[operator]


@pytest.mark.parametrize("matrix", [area_matrix, bicubic_matrix])
@pytest.mark.parametrize("sizes", [(16, 13), (5, 16), (1, 8), (8, 1)])
def test_constants_stay(matrix: object, sizes: tuple[int, int]) -> None:
    rows = matrix(*sizes).sum(axis=1)  # type: ignore[operator]
    np.testing.assert_allclose(rows, 1.0, atol=1e-6)
