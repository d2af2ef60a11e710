"""The name of every graph and tensor in a bundle, spelled once.

Shapes: B images, G rows (2B with guidance, else B), K scales, L_k tokens of scale k, P_k tokens
before it, C model width, H heads, D head width, N blocks, Cv code width, p_K latent side.
"""

from __future__ import annotations

# graphs
CONDITION = "condition"
STEP = "step"  # one graph with symbolic L and P that serves every scale
DECODER = "decoder"
ENCODER = "encoder"
ACCUMULATE = "accumulate"  # tokens of all scales → f_hat
UNCONDITIONAL = "unconditional"  # what `condition` makes, for "no prompt"; text-to-image only
# the graphs that are not one of the K static ones
FIXED_GRAPHS = (CONDITION, UNCONDITIONAL, STEP, DECODER, ENCODER, ACCUMULATE)

ENGINES = "engines"  # the folder of a bundle that holds what was built for a device

# models known by name, see `export/presets.py`, which the half without PyTorch may lack
PRESETS = (
    *("pocket", "var-d16", "var-d20", "var-d24", "var-d30", "var-d36"),
    "pocket-text",
    *("infinity-125m", "infinity-1b", "infinity-2b", "infinity-8b", "infinity-8b-512"),
)


def scale_graph(scale: int) -> str:
    """Name of the static graph of one scale."""
    return f"scale_{scale:02d}"


# condition: labels → first input and modulation
LABELS = "labels"  # [G] int64; the second half is the "no class" label under guidance
FIRST_INPUT = "first_input"  # [G, 1, C] fp32, input of scale 0
MODULATION = "modulation"  # [6N + 2, G, C] fp32, see `export/graphs/condition.py`

# scale_KK and step
INPUT = "input"  # [B, L_k, Cv] fp32 (width C in the GPT-2 form), absent at scale 0
F_HAT = "f_hat"  # [B, Cv, p_K, p_K] fp32
UNIFORMS = "uniforms"  # [B, L_k] fp32 in [0, 1), one per token
CFG = "cfg"  # [] fp32, guidance strength t of this scale; guided bundles only
TEMPERATURE = "temperature"  # [] fp32, divides the logits
TOP_K = "top_k"  # [] int64, 0 = off
TOP_P = "top_p"  # [] fp32, 0 = off
NOISE = "noise"  # [B, L_k, V] fp32, Gumbel numbers; bundles with `more_smooth` only
KEEP_MASK = "keep_mask"  # [B, L_k] bool, True where `keep_tokens` is forced
KEEP_TOKENS = "keep_tokens"  # [B, L_k] int64
TOKENS = "tokens"  # [B, L_k] int64
NEW_F_HAT = "new_f_hat"  # [B, Cv, p_K, p_K] fp32
NEXT_INPUT = "next_input"  # [B, L_{k+1}, Cv] fp32 (or C), absent at the last scale

# step alone: what a static graph knows by itself. In the GPT-2 form next_matrix is the bicubic
# [p_{k+1}, p_k] that resizes the embedded tokens of this scale.
SCALE = "scale"  # [] int64, k
UP_MATRIX = "up_matrix"  # [p_K, p_k] fp32, bicubic (identity at the last scale)
NEXT_MATRIX = "next_matrix"  # [p_{k+1}, p_K] fp32, area (any one row at the last scale)

# symbolic sizes of step: L_k, P_k (1 at scale 0, whose past is a placeholder row that is not used),
# L_{k+1}, p_k, p_{k+1}; at the last scale, which feeds no next one, the last two are 1
LENGTH, PAST, NEXT_LENGTH, SIDE, NEXT_SIDE = "L", "P", "N", "p", "q"

# text-to-image: `condition` takes features and mask of B prompts and makes rows for them, which are
# then either half of the G rows that the scales read; `unconditional` makes the second half
TEXT_FEATURES = "text_features"  # [B, S, Ct] fp32
TEXT_MASK = "text_mask"  # [B, S] bool ([G, S] in scale graphs), True at the prompt's tokens
UP_ROWS, UP_COLUMNS = "up_rows", "up_columns"  # [h_K, h_k], [w_K, w_k] fp32, linear; `step` alone
NEXT_ROWS, NEXT_COLUMNS = "next_rows", "next_columns"  # [h_{k+1}, h_K], [w_{k+1}, w_K]; the same
ROPE_COS, ROPE_SIN = "rope_cos", "rope_sin"  # [L_k, D/2] fp32; the same
# symbolic sizes of these: latent rows and columns of this scale and of the next
ROWS, COLUMNS, NEXT_ROW_COUNT, NEXT_COLUMN_COUNT = "h", "w", "m", "n"
# all symbolic sizes that an input of a graph may have
OPEN_SIZES = (
    *(LENGTH, PAST, NEXT_LENGTH, SIDE, NEXT_SIDE),
    *(ROWS, COLUMNS, NEXT_ROW_COUNT, NEXT_COLUMN_COUNT),
)

# inside the scale graphs, not an output: guided logits before temperature [B, L_k, V] fp32
LOGITS = "logits"
# inside too: unnormalised probabilities after top-k and top-p, 0 where dropped [B, L_k, V] fp32
KEPT_MASS = "kept_mass"

# inside the encoder, not an output: the continuous latent before quantisation [B, Cv, p_K, p_K]
LATENT = "latent"

# decoder and encoder
IMAGE = "image"  # [B, side, side, channels] fp32 in [0, 1]

# accumulate
F_HATS = "f_hats"  # [K, B, Cv, p_K, p_K] fp32, f_hat after each scale


def past_key(layer: int) -> str:
    """Name of the keys of the scales before, [P_k, G, H, D]."""
    return f"past_key_values.{layer}.key"


def past_value(layer: int) -> str:
    """Name of the values of the scales before, [P_k, G, H, D]."""
    return f"past_key_values.{layer}.value"


def new_key(layer: int) -> str:
    """Name of the keys of this scale, [L_k, G, H, D]; absent at the last scale."""
    return f"new_key_values.{layer}.key"


def new_value(layer: int) -> str:
    """Name of the values of this scale, [L_k, G, H, D]; absent at the last scale."""
    return f"new_key_values.{layer}.value"


def text_key(layer: int) -> str:
    """Name of a block's keys of the text, [G, H, D, S]."""
    return f"text_key_values.{layer}.key"


def text_value(layer: int) -> str:
    """Name of a block's values of the text, [G, H, S, D]."""
    return f"text_key_values.{layer}.value"


def encoder_tokens(scale: int) -> str:
    """Name of one scale's tokens, [B, L_k] int64: output of the encoder, input of `accumulate`."""
    return f"tokens_{scale:02d}"


# the graph of a text encoder, which is a bundle of its own: one prompt of S tokens, their TEXT_MASK
# [1, S] → TEXT_FEATURES [1, S, Ct], zero where the mask is False
TEXT_ENCODER = "text_encoder"
TEXT_IDS = "text_ids"  # [1, S] int64

# files and folders of a bundle
MANIFEST = "manifest.json"
TOKENIZER_JSON = "tokenizer.json"  # of a text encoder
WEIGHTS = "weights.bin"


def graph_file(graph: str) -> str:
    """File name of a graph inside its precision's folder."""
    return f"{graph}.onnx"
