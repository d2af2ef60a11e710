"""Buffers of the scale loop: where they lie, and which of them are the same memory."""

from __future__ import annotations

import numpy as np
import pytest

from var_deploy import names
from var_deploy.manifest import Manifest
from var_deploy.resize import area_matrix, bicubic_matrix
from var_deploy.runtime.buffers import (
    ALIGNMENT,
    CacheArena,
    LoopBuffers,
    aligned,
    step_geometry,
)
from var_deploy.sampling import Sampling
from var_deploy.spec import Family, ModelSpec, TokenizerSpec, TransformerSpec

SIDES = (1, 2, 3, 5)  # 3 does not divide 5: area cells overlap
PREFIX = (0, 1, 5, 14, 39)
DEPTH, HEADS, WIDTH = 2, 3, 12


def spec_of(family: Family = "var") -> ModelSpec:
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


@pytest.mark.parametrize("shape", [(), (1,), (3, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.bool_])
def test_every_buffer_starts_on_a_multiple_of_256(shape: tuple[int, ...], dtype: type) -> None:
    kept = [aligned(shape, dtype) for _ in range(20)]  # the allocator alone would not hit 20 times
    for array in kept:
        assert array.ctypes.data % ALIGNMENT == 0
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert not array.any()


@pytest.mark.parametrize("guidance", [True, False])
def test_each_scale_reads_a_prefix_and_writes_the_rows_after_it(guidance: bool) -> None:
    manifest = manifest_of(guidance=guidance)
    rows = 4 if guidance else 2
    arena = CacheArena(manifest, np.float32)
    for scale in range(len(SIDES)):
        past, new = arena.past(scale), arena.new(scale)
        assert list(past) == [
            name(layer) for layer in range(DEPTH) for name in (names.past_key, names.past_value)
        ]
        for array in past.values():
            assert array.shape == (PREFIX[scale], rows, HEADS, WIDTH // HEADS)
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
                following = arena.past(scale + 1)[past_name]
                written[...] = mark = 100 * scale + 10 * layer + len(new_name) + 1
                assert (following[PREFIX[scale] :] == mark).all()
                assert not (following[: PREFIX[scale]] == mark).any()


def test_layers_keys_and_values_do_not_overlap() -> None:
    arena = CacheArena(manifest_of(), np.float32)
    buffers = arena.past(len(SIDES) - 1)
    for mark, array in enumerate(buffers.values(), start=1):
        array[...] = mark
    assert [float(array.mean()) for array in buffers.values()] == [1.0, 2.0, 3.0, 4.0]


def test_the_arena_has_no_room_for_the_last_scale() -> None:
    values = 2 * DEPTH * PREFIX[-2] * 4 * WIDTH
    assert CacheArena(manifest_of(), np.float32).nbytes == 4 * values
    assert CacheArena(manifest_of(), np.float16).nbytes == 2 * values


def test_f_hat_goes_back_and_forth() -> None:
    buffers = LoopBuffers(manifest_of(), np.float32)
    for scale in range(len(SIDES)):
        inputs, outputs = buffers.scale_inputs(scale), buffers.scale_outputs(scale)
        assert not np.shares_memory(inputs[names.F_HAT], outputs[names.NEW_F_HAT])
        if scale + 1 < len(SIDES):
            following = buffers.scale_inputs(scale + 1)
            assert outputs[names.NEW_F_HAT] is following[names.F_HAT]
            assert outputs[names.NEXT_INPUT] is following[names.INPUT]
        else:
            assert outputs[names.NEW_F_HAT] is buffers.final_f_hat
            assert names.NEXT_INPUT not in outputs


def test_a_launch_never_writes_what_it_reads() -> None:
    buffers = LoopBuffers(manifest_of(batch=3), np.float16)
    for scale, length in enumerate(side**2 for side in SIDES):
        inputs, outputs = buffers.scale_inputs(scale), buffers.scale_outputs(scale)
        for name, written in outputs.items():
            for other, read in inputs.items():
                assert not np.shares_memory(written, read), (scale, name, other)
        assert inputs[names.UNIFORMS].shape == (3, length)
        assert inputs[names.KEEP_MASK].shape == inputs[names.KEEP_TOKENS].shape == (3, length)
        assert outputs[names.TOKENS].shape == (3, length)
        assert inputs[names.INPUT].shape == (3, length, 4)
        assert not inputs[names.KEEP_MASK].any(), "no token is forced unless asked"
        assert inputs[names.past_key(0)].dtype == np.float16
    assert buffers.image.shape == (3, 10, 10, 3)
    assert buffers.labels.shape == (6,)


@pytest.mark.parametrize("family", ["var", "gpt2"])
def test_step_geometry(family: Family) -> None:
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
