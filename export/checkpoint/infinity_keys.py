"""The names of Infinity's released tensors, and those that our modules give them.

Blocks, which are released in chunks (`block_chunks.1.module.0.sa.…`), lie flat (`blocks.3.sa.…`).
The tokenizer's convolutions and norms are released inside wrappers (`conv1.conv.weight`), in older
files without them; here they have none, as in VAR's tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from var_deploy.errors import CheckpointError

# `module` may have been taken for the name of a parallel wrapper, and removed
CHUNKED = re.compile(r"block_chunks\.(\d{1,4})\.(?:module\.)?(\d{1,4})\.", re.ASCII)
WRAPPED = re.compile(
    r"(?<=\.)(conv_in|conv_out|conv[12]|nin_shortcut|(?:down|up)sample\.conv|norm_out|norm[12])"
    r"\.(?:conv|norm)(?=\.(?:weight|bias)$)"
)
# integers that the published quantizer keeps twice: the powers of two that number the codes
UNUSED = frozenset({"quantizer.lfq.mask", "quantize.lfq.mask"})


def transformer_names(keys: Collection[str]) -> dict[str, str]:
    """Map the released names of a transformer's tensors to ours.

    Raises CheckpointError where the chunks hold different numbers of blocks, so that a block's
    number does not follow from its name.
    """
    places = {key: match for key in keys if (match := CHUNKED.match(key))}
    chunks: dict[int, set[int]] = {}
    for match in places.values():
        chunks.setdefault(int(match[1]), set()).add(int(match[2]))
    size = max((len(blocks) for blocks in chunks.values()), default=0)
    if any(blocks != set(range(size)) for blocks in chunks.values()):
        found = [len(chunks[chunk]) for chunk in sorted(chunks)]
        raise CheckpointError(
            f"block_chunks hold {found[:16]} blocks, expected the same number in each, from 0 on"
        )
    names = {key: key for key in keys}
    for key, match in places.items():
        number = int(match[1]) * size + int(match[2])
        names[key] = f"blocks.{number}.{key[match.end() :]}"
    return names


def tokenizer_names(keys: Collection[str]) -> dict[str, str]:
    """Map the released names of a tokenizer's tensors to ours, without those that are not used."""
    return {key: WRAPPED.sub(r"\1", key) for key in keys if key not in UNUSED}
