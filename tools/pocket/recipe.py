"""Training settings of pocket, the small model that ships with var-deploy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings, besides the code, that decide the trained weights.

    Attributes:
        seed: seeds the weights, the order of the data and the label dropout.
        tokenizer_images, transformer_images: drawn training images (disjoint sets).
        tokenizer_steps, transformer_steps: optimizer steps of each stage.
        plain_steps: first tokenizer steps, taken without quantising.
        commitment: weight of the quantisation error in the tokenizer's loss.
        refine_images, code_steps: latents and steps that fit codebook and φ to the encoder.
        decoder_steps: steps that fit the decoder to the finished codes.
        classifier_images, classifier_steps: drawings that the classifier learns from, its steps.
        label_dropout: share of samples trained as "no class", for guidance.
        held_out_seed: drawn images with this seed are never trained on.
    """

    seed: int = 0
    tokenizer_images: int = 20_000
    tokenizer_batch: int = 8
    tokenizer_steps: int = 1_700
    plain_steps: int = 300
    tokenizer_rate: float = 5e-3
    commitment: float = 0.2
    refine_images: int = 4_000
    code_steps: int = 400
    decoder_steps: int = 2_600
    decoder_rate: float = 3e-3
    transformer_images: int = 20_000
    transformer_batch: int = 32
    transformer_steps: int = 2_100
    transformer_rate: float = 3e-3
    classifier_images: int = 4_000
    classifier_steps: int = 600
    weight_decay: float = 0.05
    label_dropout: float = 0.1
    held_out_seed: int = 999
    threads: int = 2
