"""Training settings of pocket-text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings, besides the code, that decide the trained weights.

    Attributes:
        seed: seeds the weights, the drawings, the sentences and all that is left to chance.
        tokenizer_steps, decoder_steps: optimizer steps on the whole tokenizer, and then on its
            decoder alone.
        commitment: weight of the quantisation error in the tokenizer's loss.
        text_encoder_batch, text_encoder_steps: sentences per step, and steps, of the stage that
            trains the text encoder alone.
        transformer_images: drawings whose latents the transformer learns from, each several times
            with other sentences.
        flips: most of a scale's bits that are given to the transformer wrong (Infinity's
            self-correction, arXiv 2412.04431, section 3.3).
        text_dropout: share of samples trained as "no prompt", for guidance.
        unknown_words: share of sentences in which one word is made unknown.
        classifier_images, classifier_steps: drawings that the classifier learns from, its steps.
        held_out_seed: drawings with this seed, and the two after it, are never trained on.
        threads: of PyTorch; one is faster than two on a machine that others use too.
    """

    seed: int = 0
    tokenizer_batch: int = 8
    tokenizer_steps: int = 3_400
    tokenizer_rate: float = 5e-3
    commitment: float = 0.25
    decoder_steps: int = 1_200
    decoder_rate: float = 3e-3
    text_encoder_batch: int = 64
    text_encoder_steps: int = 500
    text_encoder_rate: float = 3e-3
    transformer_images: int = 48_000
    transformer_batch: int = 48
    transformer_steps: int = 4_600
    transformer_rate: float = 3e-3
    weight_decay: float = 0.05
    flips: float = 0.2
    text_dropout: float = 0.1
    unknown_words: float = 0.05
    classifier_images: int = 12_000
    classifier_steps: int = 2_000
    held_out_seed: int = 999
    threads: int = 2
