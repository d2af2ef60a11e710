"""Counts bytes and operations of each launch of a text-to-image bundle, and of its text encoder.

Bytes of weights are those of the manifest. Products of matrices and convolutions count, a
multiply-add as two operations; see `planning.costs` for models whose tokens are codes.
"""

from __future__ import annotations

from math import prod

from var_deploy import names
from var_deploy.config import Precision
from var_deploy.manifest import GraphInfo, Manifest
from var_deploy.planning.costs import FULL, Work
from var_deploy.runtime.measure import launch_names
from var_deploy.spec import BitTokenizerSpec, Grid, TextModelSpec
from var_deploy.text.manifest import TextEncoderManifest


def text_launches(manifest: Manifest, precision: Precision) -> list[Work]:
    """Return the launches of one generation of B images, in order.

    Attention is fp32 in int8 graphs, as are the head and all that follows it.
    """
    model, graphs = manifest.model, manifest.graphs[precision]
    assert isinstance(model, TextModelSpec)
    found = []
    for name in launch_names(manifest):
        if name == names.CONDITION:
            found.append(_condition(manifest, model, precision, graphs[name]))
        elif name == names.UNCONDITIONAL:
            found.append(_unconditional(manifest, model, precision, graphs[name]))
        elif name == names.DECODER:
            found.append(_decoder(manifest, model.tokenizer, precision, graphs[name]))
    scales = [_scale(manifest, model, precision, k) for k in range(model.scales)]
    return [*found[:-1], *scales, found[-1]]


def text_encoder_work(
    manifest: TextEncoderManifest, precision: Precision, prompts: int
) -> dict[str, int]:
    """Return the work of encoding `prompts` prompts, see `About.work`.

    A launch takes one prompt, padded to the length of the graph.
    """
    s, graph = manifest.model, manifest.graphs[precision][names.TEXT_ENCODER]
    inner, tokens = s.heads * s.head_width, s.length * s.depth
    compute = 2 * tokens * (4 * s.width * inner + 2 * s.width * s.ffn_width)
    attended = 4 * tokens * s.length * inner
    full = 2 * tokens * s.ffn_width * s.width  # `wo` is fp32 in every precision
    if precision == "int8":
        full += attended
    else:
        compute += attended
    return {
        "weights": graph.weight_bytes,
        "compute": prompts * compute,
        "full": prompts * full,
    }


def weights_in_use(manifest: Manifest, precision: Precision) -> int:
    """Return the bytes of the weights of one generation, each counted once.

    `step` has the weights of the static graphs of all scales, as has every later scale.
    """
    graphs = manifest.graphs[precision]
    wanted = {names.scale_graph(k) for k in range(manifest.model.scales)}
    scales = [graph for name, graph in graphs.items() if name in wanted]
    step = graphs.get(names.STEP) or max(scales, key=lambda graph: graph.weight_bytes)
    rest = graphs[names.CONDITION].weight_bytes + graphs[names.DECODER].weight_bytes
    if names.UNCONDITIONAL in graphs:
        assert isinstance(manifest.model, TextModelSpec)
        common = _weights_of_both_conditions(manifest.model, precision)
        rest += graphs[names.UNCONDITIONAL].weight_bytes - common
    return step.weight_bytes + rest


def _weights_of_both_conditions(model: TextModelSpec, precision: Precision) -> int:
    """Bytes of the weights that `condition` and `unconditional` share: pool and modulation."""
    t = model.transformer
    c, itemsize = t.width, 2 if precision == "fp16" else FULL
    pool = t.text_width * c + c * c + 2 * c
    modulation = 8 * c * c + 8 * c
    own = (6 * c * t.depth + c) * FULL  # of the blocks, and the first position
    if precision == "int8":  # a matrix of bytes, with a scale and a bias per column
        return pool * FULL + 8 * c * c + 16 * c * FULL + own
    return (pool + modulation) * itemsize + own


def _io(graph: GraphInfo) -> int:
    """Bytes of the inputs and outputs of a static graph."""
    sizes = {"bool": 1, "float16": 2, "int64": 8}
    return sum(
        prod(int(size) for size in tensor.shape) * sizes.get(tensor.dtype, FULL)
        for tensor in (*graph.inputs, *graph.outputs)
    )


def _split(precision: Precision, products: int, attended: int, full: int) -> tuple[int, int]:
    """Operations in the precision of the graph, and in fp32; attention is fp32 in int8 graphs."""
    if precision == "int8":
        return products, full + attended
    return products + attended, full


def _condition(
    manifest: Manifest, model: TextModelSpec, precision: Precision, graph: GraphInfo
) -> Work:
    t, batch = model.transformer, manifest.batch
    tokens, c = batch * t.text_length, t.width
    products = 2 * tokens * (t.text_width * c + c * c + 2 * c * c * t.depth)
    products += 2 * batch * 8 * c * c  # modulation
    pool = 4 * tokens * t.text_width * t.pool_heads + 2 * batch * (t.text_width * c + c * c)
    compute, full = _split(precision, products, 0, pool)
    return Work(
        name=names.CONDITION,
        compute_operations=compute,
        full_operations=full,
        traffic=graph.weight_bytes + _io(graph),
    )


def _unconditional(
    manifest: Manifest, model: TextModelSpec, precision: Precision, graph: GraphInfo
) -> Work:
    t, batch = model.transformer, manifest.batch
    pool = 2 * batch * (t.text_length * t.text_width * t.pool_heads)
    pool += 2 * batch * (t.text_width * t.width + t.width**2)
    compute, full = _split(precision, 2 * batch * 8 * t.width**2, 0, pool)
    return Work(
        name=names.UNCONDITIONAL,
        compute_operations=compute,
        full_operations=full,
        traffic=graph.weight_bytes + _io(graph),
    )


def _scale(manifest: Manifest, model: TextModelSpec, precision: Precision, scale: int) -> Work:
    t, tok, rows = model.transformer, model.tokenizer, manifest.rows
    length, past = model.scale_lengths[scale], model.prefix_lengths[scale]
    c, graphs = t.width, manifest.graphs[precision]
    tokens = rows * length
    products = 2 * tokens * t.depth * (6 * c * c + 2 * c * t.ffn_width)
    attended = 4 * tokens * (past + length + t.text_length) * c * t.depth
    full = 2 * tokens * c * tok.token_bits
    full += 2 * manifest.batch * length * c * tok.token_bits if scale else 0
    grids, whole = tok.latent_grids, tok.latent_grid
    resized = [(grids[scale], whole)]
    if scale + 1 < model.scales:
        resized.append((whole, grids[scale + 1]))
    full += sum(2 * manifest.batch * tok.bits * _resize(*pair) for pair in resized)
    compute, full = _split(precision, products, attended, full)
    cache = past if scale + 1 == model.scales else past + length  # read and written
    itemsize = 2 if precision == "fp16" else FULL
    numbers = 2 * t.depth * rows * c * (cache + t.text_length)
    other = (6 * t.depth + 2) * rows * c + 2 * manifest.batch * tok.bits * prod(whole)
    graph = graphs.get(names.scale_graph(scale)) or graphs[names.STEP]
    return Work(
        name=names.scale_graph(scale),
        compute_operations=compute,
        full_operations=full,
        traffic=graph.weight_bytes + numbers * itemsize + other * FULL,
    )


def _resize(source: Grid, target: Grid) -> int:
    """Multiplications of resizing one map: its rows, then its columns."""
    if source == target:
        return 0
    return target[0] * source[1] * (source[0] + target[1])


def _decoder(
    manifest: Manifest, spec: BitTokenizerSpec, precision: Precision, graph: GraphInfo
) -> Work:
    """The decoder. Its 3 × 3 convolutions are int8 where its weights are as small as that."""
    phases = precision != "fp16"  # an up-sampling is four 2 × 2 convolutions before it
    first_and_last, inner, weights = _decoder_operations(spec, phases)
    rounded = precision == "int8" and graph.weight_bytes < 2 * weights
    compute, full = (inner, first_and_last) if rounded else (0, first_and_last + inner)
    if precision != "int8":
        compute, full = full, 0
    return Work(
        name=names.DECODER,
        compute_operations=manifest.batch * compute,
        full_operations=manifest.batch * full,
        traffic=graph.weight_bytes + _io(graph),
    )


def _decoder_operations(spec: BitTokenizerSpec, phases: bool) -> tuple[int, int, int]:
    """Operations of the first, last and 1 × 1 convolutions, those of all others, and the number of
    all weights, for one image."""
    widths = [spec.base_width * m for m in spec.width_multipliers]
    positions, coming = prod(spec.latent_grid), widths[-1]
    outer = [(9 * spec.bits * coming, positions)]  # weights, and positions that each is used at
    inner = [(9 * coming * coming, positions)] * 4  # two residual blocks
    for level in range(len(widths) - 1, -1, -1):
        width = widths[level]
        for _ in range(spec.res_blocks + 1):
            inner += [(9 * coming * width, positions), (9 * width * width, positions)]
            if coming != width:
                outer.append((coming * width, positions))
            coming = width
        if level and phases:
            inner += [(4 * width * width, positions)] * 4
            positions *= 4
        elif level:
            positions *= 4
            inner.append((9 * width * width, positions))
    outer.append((9 * coming * spec.image_channels, positions))
    weights = sum(taps for taps, _ in (*outer, *inner))
    return (
        sum(2 * taps * places for taps, places in outer),
        sum(2 * taps * places for taps, places in inner),
        weights,
    )
