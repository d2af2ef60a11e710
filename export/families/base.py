"""The interface of a model family on the build machine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray
from torch import Tensor

from var_deploy.config import GraphForm
from var_deploy.export.graphs.builder import GraphBuilder, ReadKey
from var_deploy.export.models.tokenizer import Tokenizer
from var_deploy.export.models.transformer import NextScaleTransformer
from var_deploy.spec import ModelSpec, TokenizerSpec

HasKey = Callable[[str], bool]
SizeOf = Callable[[str, int], int]  # (key, dimension) → its size


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """Facts that all blocks of one graph share.

    Attributes:
        rows: G.
        modulation: value name of the modulation table, None in families without one.
        past: whether the graph has a cache to read.
        alone: a bool value that is true at scale 0 of `step`, where the cache row is a
            placeholder; None in static graphs, which know.
    """

    spec: ModelSpec
    rows: int
    modulation: str | None
    past: bool
    alone: str | None = None


class ExportFamily(ABC):
    """The graph operators, reference module and checkpoint keys in which one family differs from
    others.

    Hidden states are [L, G, C]. The keys are those of the family's state dict.

    Attributes:
        name: the value of `TransformerSpec.family`.
        marks: keys that the transformers of this family alone have; two of them tell it.
        start_key: a learned vector [1, 1, C].
        positions_key, levels_key: position and level embeddings.
        heads_key: a tensor whose dimension 1 is the number of heads, where there is one.
        usual_head_width: width of a head where nothing tells; None: it must be told.
        published_loop: whether `published_path` can drive the module as the published code does.
    """

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    start_key: ClassVar[str]
    heads_key: ClassVar[str]
    usual_head_width: ClassVar[int | None]
    positions_key: ClassVar[str]
    levels_key: ClassVar[str]
    published_loop: ClassVar[bool]

    # checkpoints

    @abstractmethod
    def own_sizes(self, has: HasKey, size: SizeOf) -> dict[str, Any]:
        """Read the fields of TransformerSpec that this family alone has off a state dict."""

    @abstractmethod
    def input_weights(self, width: int, tokenizer: TokenizerSpec) -> dict[str, tuple[int, ...]]:
        """Return keys and shapes of the weights that read the tokenizer's codes or tokens, at model
        width C."""

    # graphs

    @abstractmethod
    def condition(self, spec: ModelSpec, form: GraphForm) -> GraphBuilder | None:
        """Build the graph that runs once per image, before the scales; None where there is none."""

    @abstractmethod
    def modulation(self, b: GraphBuilder, spec: ModelSpec, form: GraphForm) -> str | None:
        """Declare the modulation table as an input, where the family has one."""

    @abstractmethod
    def first_hidden(self, b: GraphBuilder, spec: ModelSpec, form: GraphForm) -> str:
        """Return the hidden state of scale 0, [1, G, C]."""

    @abstractmethod
    def embed(self, b: GraphBuilder, spec: ModelSpec, inputs: str) -> str:
        """Embed the inputs of a later scale: [B, L, input_width] → [L, B, C]."""

    @abstractmethod
    def norm(self, b: GraphBuilder, ctx: BlockContext, x: str, layer: int, which: int) -> str:
        """Apply LayerNorm number `which` (0: attention, 1: feed-forward) of a block."""

    @abstractmethod
    def head_norm(self, b: GraphBuilder, ctx: BlockContext, x: str) -> str:
        """Apply the LayerNorm before the head."""

    @abstractmethod
    def add_branch(
        self, b: GraphBuilder, ctx: BlockContext, x: str, h: str, layer: int, which: int
    ) -> str:
        """Return x plus the branch `which` (0: attention, 1: feed-forward) of a block, in fp32."""

    @abstractmethod
    def qkv_key(self, layer: int) -> str:
        """Return the state-dict key of the joint query, key and value projection [3C, C]."""

    @abstractmethod
    def qkv_bias(self, layer: int) -> Callable[[ReadKey], NDArray[Any]]:
        """Return a function that makes the bias [3C] of the joint projection."""

    @abstractmethod
    def next_maps(self, b: GraphBuilder, spec: ModelSpec, row: str | int) -> str | None:
        """Return the table [V, C] that embeds the tokens of a scale for the next scale.

        `row` is the scale's number, or the value that holds it. Returns None in a family whose next
        input is resized from f_hat.
        """

    # reference

    @abstractmethod
    def transformer(self, spec: ModelSpec) -> NextScaleTransformer:
        """Build the reference module, with the state-dict keys of the family's checkpoints."""

    @abstractmethod
    def next_input(
        self, transformer: Any, tokenizer: Tokenizer, scale: int, tokens: Tensor, f_hat: Tensor
    ) -> Tensor:
        """Return the input of the scale after `scale`, [B, L_{k+1}, input_width]."""
