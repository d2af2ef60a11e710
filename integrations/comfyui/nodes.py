"""Nodes that load a bundle, draw from a class or a prompt, and edit with a mask.

At their edge are ComfyUI's own types: IMAGE is a float tensor [B, H, W, C] from 0 to 1, MASK a
float tensor [B, H, W], 1 where the image is to be new. Inside there is a `var_deploy.Pipeline`,
which runs without PyTorch. Progress, previews and "Cancel" go through ComfyUI's modules where these
nodes run in it; elsewhere, as in a test, nothing is shown.

Interface: https://docs.comfy.org/custom-nodes/backend/server_overview
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from var_deploy import Pipeline
from var_deploy.manifest import read_manifest
from var_deploy.runtime.request import ScaleEvent
from var_deploy.sampling import MAX_SEED, parse_setting

PIPELINE, SETTINGS = "VAR_DEPLOY_PIPELINE", "VAR_DEPLOY_SETTINGS"
CATEGORY = "var-deploy"
LARGEST_PREVIEW = 512  # pixels a side
SAME = "same as the bundle"

SEED = (
    "INT",
    {
        "default": 0,
        "min": 0,
        "max": MAX_SEED,
        "control_after_generate": True,
        "tooltip": "Image i of the batch has this seed + i.",
    },
)
BATCH = ("INT", {"default": 1, "min": 1, "max": 256, "tooltip": "How many images."})
TEXT = {"multiline": True, "dynamicPrompts": True}
WHICH = (PIPELINE, {"tooltip": "From the node Load Bundle."})


class LoadBundle:
    """Opens a folder that `var-deploy export` wrote."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Opens a bundle: a folder that `var-deploy export` wrote."
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("bundle",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "folder": ("STRING", {"default": "", "placeholder": "/path/to/bundle"}),
                "precision": (["auto", "fp32", "fp16", "int8"], {"default": "auto"}),
                "backend": (
                    ["auto", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"],
                    {"default": "auto"},
                ),
            },
            "optional": {
                "text_encoder": (
                    "STRING",
                    {"default": "", "tooltip": "Its folder; empty looks beside the bundle."},
                )
            },
        }

    @classmethod
    def IS_CHANGED(cls, folder: str, **others: Any) -> str:
        """A bundle that was exported again is loaded again."""
        return read_manifest(Path(folder)).digest()

    def load(
        self, folder: str, precision: str, backend: str, text_encoder: str = ""
    ) -> tuple[Pipeline]:
        return (
            Pipeline.load(
                folder, backend=backend, precision=precision, text_encoder=text_encoder or None
            ),
        )


class Settings:
    """How images are drawn; an empty field takes what the bundle recommends."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Each setting is a number, a ramp over the scales such as 1:4, or one value per scale such "
        "as 0,1,2; empty takes what the bundle recommends."
    )
    RETURN_TYPES = (SETTINGS,)
    RETURN_NAMES = ("settings",)
    FUNCTION = "collect"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        told = {
            "cfg": "Guidance: of a model with classes 0 is none, of a text-to-image model 1.",
            "top_k": "Keeps the k likeliest codes; 0 keeps all. Text-to-image models have none.",
            "top_p": "Keeps the likeliest codes with this probability; 0 keeps all.",
            "temperature": "Divides the logits; less than 1 draws likelier codes.",
        }
        return {
            "required": {},
            "optional": {
                name: ("STRING", {"default": "", "placeholder": SAME, "tooltip": text})
                for name, text in told.items()
            },
        }

    def collect(self, **texts: str) -> tuple[dict[str, str]]:
        return ({name: text for name, text in texts.items() if text.strip()},)


class GenerateFromClass:
    """Draws images of a class."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Draws images of a class with a model that takes classes."
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "bundle": WHICH,
                "label": (
                    "STRING",
                    {"default": "0", "tooltip": "Number or name; several with commas, in turn."},
                ),
                "seed": SEED,
                "batch": BATCH,
            },
            "optional": {"settings": (SETTINGS,)},
        }

    def generate(
        self,
        bundle: Pipeline,
        label: str,
        seed: int,
        batch: int,
        settings: Mapping[str, str] | None = None,
    ) -> tuple[torch.Tensor]:
        labels = [_label(part) for part in label.split(",")]
        images = bundle.generate(labels, seed, count=batch, **_options(bundle, settings))
        return (to_image(images),)


class GenerateFromPrompt:
    """Draws images of a prompt."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Draws images of a prompt with a text-to-image model."
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "bundle": WHICH,
                "prompt": ("STRING", {"default": "", **TEXT}),
                "seed": SEED,
                "batch": BATCH,
            },
            "optional": {"negative": ("STRING", {"default": "", **TEXT}), "settings": (SETTINGS,)},
        }

    def generate(
        self,
        bundle: Pipeline,
        prompt: str,
        seed: int,
        batch: int,
        negative: str = "",
        settings: Mapping[str, str] | None = None,
    ) -> tuple[torch.Tensor]:
        images = bundle.generate(
            None,
            seed,
            prompts=[prompt],
            negative=negative or None,
            count=batch,
            **_options(bundle, settings),
        )
        return (to_image(images),)


class Edit:
    """Draws the masked part of an image anew."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Draws an image anew where its mask is white. What to put there is a class, a prompt, or "
        "nothing: then the surroundings decide."
    )
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "edit"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "bundle": WHICH,
                "image": ("IMAGE", {"tooltip": "Of a batch the first is taken."}),
                "mask": ("MASK", {"tooltip": "Of the image's size, or the model's."}),
                "what": ("STRING", {"default": "", "tooltip": "A class, or a prompt.", **TEXT}),
                "seed": SEED,
                "batch": BATCH,
                "keep_pixels": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Outside the mask the pixels stay as they are."},
                ),
            },
            "optional": {"negative": ("STRING", {"default": "", **TEXT}), "settings": (SETTINGS,)},
        }

    def edit(
        self,
        bundle: Pipeline,
        image: torch.Tensor,
        mask: torch.Tensor,
        what: str,
        seed: int,
        batch: int,
        keep_pixels: bool,
        negative: str = "",
        settings: Mapping[str, str] | None = None,
    ) -> tuple[torch.Tensor]:
        words: dict[str, Any] = {"label": _label(what) if what.strip() else None}
        if bundle.manifest.takes_text:
            words = {"prompt": what, "negative": negative or None}
        images = bundle.edit(
            to_pixels(image[:1])[0],
            to_mask(mask),
            seed=seed,
            count=batch,
            keep_pixels=keep_pixels,
            **words,
            **_options(bundle, settings),
        )
        return (to_image(images),)


def to_image(images: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
    """Return an IMAGE, float32 [B, H, W, 3], of uint8 [B, H, W, 3 or 1]."""
    plain = np.asarray(images, np.float32) / 255
    return torch.from_numpy(plain if plain.shape[-1] == 3 else np.repeat(plain, 3, -1))


def to_pixels(image: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return uint8 [B, H, W, C] of an IMAGE."""
    values = image.detach().cpu().numpy().clip(0, 1)
    return (values * 255).round().astype(np.uint8)


def to_mask(mask: torch.Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return bool [H, W], True where the image is to be new, of a MASK [H, W] or [B, H, W]."""
    values = mask.detach().cpu().numpy()
    return np.asarray((values if values.ndim == 2 else values[0]) > 0.5)


def _label(text: str) -> int | str:
    word = text.strip()
    return int(word) if word.isdecimal() else word


def _options(bundle: Pipeline, settings: Mapping[str, str] | None) -> dict[str, Any]:
    """Keywords of a generation: its settings, and what reports on it."""
    scales = bundle.manifest.model.scales
    options: dict[str, Any] = {
        name: parse_setting(name, text, scales) for name, text in (settings or {}).items()
    }
    on_scale = _reporter(bundle)
    return options if on_scale is None else {**options, "on_scale": on_scale}


def _reporter(bundle: Pipeline) -> Callable[[ScaleEvent], None] | None:
    """Return what shows each scale in ComfyUI, and stops where its user does; None elsewhere."""
    try:
        progress = importlib.import_module("comfy.utils")
        stopping = importlib.import_module("comfy.model_management")
    except ImportError:
        return None
    bar = progress.ProgressBar(bundle.manifest.model.scales)

    def on_scale(event: ScaleEvent) -> None:
        stopping.throw_exception_if_processing_interrupted()
        image = event.preview()[0]
        picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
        done, scales = event.scale + 1, event.scales
        bar.update_absolute(done, scales, ("JPEG", picture, LARGEST_PREVIEW))

    return on_scale


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "VarDeployLoadBundle": LoadBundle,
    "VarDeploySettings": Settings,
    "VarDeployGenerateFromClass": GenerateFromClass,
    "VarDeployGenerateFromPrompt": GenerateFromPrompt,
    "VarDeployEdit": Edit,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "VarDeployLoadBundle": "Load Bundle (var-deploy)",
    "VarDeploySettings": "Sampling Settings (var-deploy)",
    "VarDeployGenerateFromClass": "Generate from Class (var-deploy)",
    "VarDeployGenerateFromPrompt": "Generate from Prompt (var-deploy)",
    "VarDeployEdit": "Edit with a Mask (var-deploy)",
}
