"""Buffers of the scale loop: where they lie, and which of them are the same memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from var_deploy import names
from var_deploy.image.resize import area_matrix, bicubic_matrix
from var_deploy.manifest import Manifest
from var_deploy.runtime.backends.host_memory import HostMemory, host_view
from var_deploy.runtime.backends.protocol import ALIGNMENT, Array
from var_deploy.runtime.blocks import Block, SharedBlock, pack
from var_deploy.runtime.buffers import (
    CacheArena,
    FHatPlace,
    LoopBuffers,
    step_geometry,
    step_shapes,
)
from var_deploy.sampling import Sampling
from var_deploy.spec import ModelSpec, TokenizerSpec, TransformerSpec

SIDES = (1, 2, 3, 5)  # 3 does not divide 5: area cells overlap
PREFIX = (0, 1, 5, 14, 39)
DEPTH, HEADS, WIDTH = 2, 3, 12


def spec_of(family: str = "var") -> ModelSpec:
    return ModelSpec(
        tokenizer=TokenizerSpec(
            patch_nums=SIDES, vocab_size=16, code_width=4, base_width=32, width_multipliers=(1, 2)
        ),
        transformer=TransformerSpec(
            family=family,
            depth=DEPTH,
            width=WIDTH,
            heads=HEADS,
            classes=5 if family == "var" else 0,
            ffn_width=24,
        ),
    )


def manifest_of(*, batch: int = 2, guidance: bool = True) -> Manifest:
    return Manifest(
        model=spec_of(),
        preset="",
        batch=batch,
        guidance=guidance,
        graphs={},
        files={},
        checkpoint={},
        tools={},
        defaults=Sampling(),
    )


def arena_of(dtype: type = np.float32, **options: Any) -> CacheArena:
    return CacheArena(manifest_of(**options), dtype, HostMemory())


def views(arrays: dict[str, Array]) -> dict[str, NDArray[Any]]:
    return {name: host_view(array) for name, array in arrays.items()}


def overlap(a: Array, b: Array) -> bool:
    return a.address < b.address + b.nbytes and b.address < a.address + a.nbytes


FIELDS = {
    "scalar": ((), np.float32),
    "flags": ((3, 5), np.bool_),
    "half": ((7,), np.float16),
    "long": ((2, 65), np.int64),
}


@pytest.mark.parametrize("kind", [Block, SharedBlock])
def test_fields_of_a_block_are_aligned_zero_and_apart(kind: Any) -> None:
    block = kind(HostMemory(), FIELDS)
    arrays = [block[name] for name in FIELDS]
    for array, (shape, dtype) in zip(arrays, FIELDS.values(), strict=True):
        assert array.address % ALIGNMENT == 0
        assert (array.shape, array.dtype) == (shape, dtype)
        view = host_view(array)
        assert view.flags.c_contiguous
        assert view.flags.writeable
        assert not view.any()
        assert [a for a in arrays if overlap(a, array)] == [array]
    assert block.nbytes == pack(FIELDS)[1] == 256 + 256 + 256 + 1280


def test_the_host_side_of_a_shared_block_is_what_graphs_see() -> None:
    block = SharedBlock(HostMemory(), FIELDS)
    block.host["long"][1, 64] = 7
    block.upload()
    assert host_view(block["long"])[1, 64] == 7


@pytest.mark.parametrize("guidance", [True, False])
def test_each_scale_reads_a_prefix_and_writes_the_rows_after_it(guidance: bool) -> None:
    rows = 4 if guidance else 2
    arena = arena_of(guidance=guidance)
    for scale in range(len(SIDES)):
        past, new = views(arena.past(scale)), views(arena.new(scale))
        assert list(past) == [
            name(layer) for layer in range(DEPTH) for name in (names.past_key, names.past_value)
        ]
        for array in past.values():
            assert array.shape == (max(PREFIX[scale], 1), rows, HEADS, WIDTH // HEADS)
            assert array.flags.c_contiguous
        if scale == len(SIDES) - 1:
            assert new == {}, "nobody reads the last scale's rows"
            continue
        for layer in range(DEPTH):
            for new_name, past_name in (
                (names.new_key(layer), names.past_key(layer)),
                (names.new_value(layer), names.past_value(layer)),
            ):
                written = new[new_name]
                assert written.shape == (SIDES[scale] ** 2, rows, HEADS, WIDTH // HEADS)
                assert written.flags.c_contiguous
                following = host_view(arena.past(scale + 1)[past_name])
                written[...] = mark = 100 * scale + 10 * layer + len(new_name) + 1
                assert (following[PREFIX[scale] :] == mark).all()
                assert not (following[: PREFIX[scale]] == mark).any()


def test_the_placeholder_of_scale_0_is_nobodys_row() -> None:
    arena = arena_of()
    placeholder = next(iter(arena.past(0).values()))
    for scale in range(1, len(SIDES)):
        assert not any(overlap(placeholder, array) for array in arena.past(scale).values())
        assert not any(overlap(placeholder, array) for array in arena.new(scale).values())


def test_layers_keys_and_values_do_not_overlap() -> None:
    buffers = views(arena_of().past(len(SIDES) - 1))
    for mark, array in enumerate(buffers.values(), start=1):
        array[...] = mark
    assert [float(array.mean()) for array in buffers.values()] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_arena_has_no_room_for_the_last_scale(dtype: type) -> None:
    row = 4 * WIDTH * np.dtype(dtype).itemsize
    sizes = [row, *[PREFIX[-2] * row] * 2 * DEPTH]
    assert arena_of(dtype).nbytes == sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def test_f_hat_goes_back_and_forth_and_begins_with_zeros() -> None:
    buffers = LoopBuffers(manifest_of(), np.float32, HostMemory())
    first = buffers.scale_inputs(0)[names.F_HAT]
    for scale in range(len(SIDES)):
        inputs, outputs = buffers.scale_inputs(scale), buffers.scale_outputs(scale)
        assert not overlap(inputs[names.F_HAT], outputs[names.NEW_F_HAT])
        assert not overlap(first, outputs[names.NEW_F_HAT]), "a second generation starts at 0 too"
        if scale + 1 < len(SIDES):
            following = buffers.scale_inputs(scale + 1)
            assert outputs[names.NEW_F_HAT] is following[names.F_HAT]
            assert outputs[names.NEXT_INPUT] is following[names.INPUT]
        else:
            place = FHatPlace.after(len(SIDES))
            assert outputs[names.NEW_F_HAT] is buffers.decoder_inputs(place)[names.F_HAT]
            assert names.NEXT_INPUT not in outputs


def test_a_launch_never_writes_what_it_reads() -> None:
    buffers = LoopBuffers(manifest_of(batch=3), np.float16, HostMemory())
    for scale, length in enumerate(side**2 for side in SIDES):
        inputs, outputs = buffers.scale_inputs(scale), buffers.scale_outputs(scale)
        for name, written in outputs.items():
            assert written.address % ALIGNMENT == 0 or name.startswith("new_key_values")
            for other, read in inputs.items():
                assert not overlap(written, read), (scale, name, other)
        assert all(array.address % ALIGNMENT == 0 for array in inputs.values())
        assert inputs[names.UNIFORMS].shape == (3, length)
        assert inputs[names.KEEP_MASK].shape == inputs[names.KEEP_TOKENS].shape == (3, length)
        assert outputs[names.TOKENS].shape == (3, length)
        assert inputs[names.INPUT].shape == (3, length, 4)
        assert not host_view(inputs[names.KEEP_MASK]).any(), "no token is forced unless asked"
        assert inputs[names.past_key(0)].dtype == np.float16
    assert buffers.image().shape == (3, 10, 10, 3)
    assert buffers.condition_inputs()[names.LABELS].shape == (6,)


def test_filling_reaches_every_launch() -> None:
    buffers = LoopBuffers(manifest_of(), np.float32, HostMemory())
    draws = np.arange(2 * PREFIX[-1], dtype=np.float32).reshape(2, -1)
    buffers.fill([3, 1], draws, Sampling(cfg=6.0, temperature=0.5, top_k=9, top_p=0.25))
    np.testing.assert_array_equal(
        host_view(buffers.condition_inputs()[names.LABELS]), [3, 1, 5, 5]
    )
    for scale in range(len(SIDES)):
        inputs = views(buffers.scale_inputs(scale))
        assert inputs[names.CFG] == 6.0 * scale / 3
        assert (inputs[names.TEMPERATURE], inputs[names.TOP_K]) == (0.5, 9)
        assert inputs[names.TOP_P] == 0.25
        assert inputs[names.SCALE] == scale
        np.testing.assert_array_equal(
            inputs[names.UNIFORMS], draws[:, PREFIX[scale] : PREFIX[scale + 1]]
        )


def test_nbytes_counts_every_allocation() -> None:
    class Counting(HostMemory):
        total = 0

        def allocate(self, size: int) -> Array:
            self.total += size
            return super().allocate(size)

        def share(self, size: int) -> Any:
            self.total += size
            return super().share(size)

    memory = Counting()
    assert LoopBuffers(manifest_of(), np.float16, memory).nbytes == memory.total > 0


@pytest.mark.parametrize("family", ["var", "gpt2"])
def test_step_geometry(family: str) -> None:
    spec, side = spec_of(family), SIDES[-1]
    for scale, patch in enumerate(SIDES):
        geometry = step_geometry(spec, scale)
        assert geometry[names.SCALE] == scale
        assert geometry[names.SCALE].dtype == np.int64
        up, following = geometry[names.UP_MATRIX], geometry[names.NEXT_MATRIX]
        assert up.dtype == following.dtype == np.float32
        np.testing.assert_array_equal(up, bicubic_matrix(patch, side))
        for matrix in (up, following):  # a constant image stays what it is
            np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
        after = SIDES[scale + 1] if scale + 1 < len(SIDES) else 1
        if family == "var":  # the next input is f_hat, made smaller
            np.testing.assert_array_equal(following, area_matrix(side, after))
        else:  # the next input is this scale's embedded tokens, resized
            np.testing.assert_array_equal(following, bicubic_matrix(patch, after))
    np.testing.assert_array_equal(up, np.eye(side))
    assert following.shape == (1, side), "the last scale feeds no next one"


def test_step_shapes_are_those_of_the_buffers(pocket_bundle: Path) -> None:
    from var_deploy.manifest import read_manifest

    manifest = read_manifest(pocket_bundle)
    buffers = LoopBuffers(manifest, np.float32, HostMemory())
    for scale in range(manifest.model.scales):
        shapes = step_shapes(manifest, "fp32", scale)
        assert shapes == {name: buffers.scale_inputs(scale)[name].shape for name in shapes}
        assert all(0 not in shape for shape in shapes.values()), "TensorRT knows no empty input"
