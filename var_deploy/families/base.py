"""The interface of a model family for runtime, planner and manifest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

if TYPE_CHECKING:
    from var_deploy.spec import ModelSpec, TransformerSpec


class Family(ABC):
    """Sizes, inputs and costs in which the transformers of one family differ from others.

    Attributes:
        name: the value of `TransformerSpec.family`, as manifests store it.
        conditional: whether the model takes a class label, and so can be guided.
        least_scales: fewest scales that a model can have.
        mixes_codes: whether `more_smooth` sampling is defined: the next input is made from f_hat.
    """

    name: ClassVar[str]
    conditional: ClassVar[bool]
    mixes_codes: ClassVar[bool]
    least_scales: ClassVar[int]

    @abstractmethod
    def attention_scale(self, transformer: TransformerSpec) -> float:
        """Return the factor on q·k before the softmax."""

    @abstractmethod
    def input_width(self, model: ModelSpec) -> int:
        """Return the width of the rows that a scale takes as its input."""

    @abstractmethod
    def next_source_side(self, model: ModelSpec, scale: int) -> int:
        """Return the side of the maps that are resized to the input of the scale after `scale`."""

    @abstractmethod
    def next_matrix(self, model: ModelSpec, scale: int, target: int) -> NDArray[Any]:
        """Return the resizing matrix [target, next_source_side] of the input of the scale after
        `scale`."""

    # what the planner counts

    @abstractmethod
    def norm_weights(self, transformer: TransformerSpec) -> int:
        """Return the number of weights of one LayerNorm in the scale graphs: 0 where `condition`
        makes them."""

    @abstractmethod
    def first_weights(self, model: ModelSpec) -> int:
        """Return the number of weights that the scale graphs hold only for the first scale's
        input."""

    @abstractmethod
    def embed_weights(self, model: ModelSpec) -> int:
        """Return the number of weights of the product that embeds the inputs of the later
        scales."""

    @abstractmethod
    def next_tables(self, model: ModelSpec) -> int:
        """Return the number of values of the look-up tables that give the next input."""

    @abstractmethod
    def embed_operations(self, model: ModelSpec, tokens: int) -> int:
        """Return the operations of embedding `tokens` rows of input."""

    @abstractmethod
    def modulation_rows(self, transformer: TransformerSpec) -> int:
        """Return the rows of the modulation table [rows, G, C] that every scale reads."""
