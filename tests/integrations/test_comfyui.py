"""The nodes for ComfyUI, called as ComfyUI calls them.

The interface is the documented one: INPUT_TYPES names the inputs with their types, FUNCTION is
called with them as keywords, and returns one value per entry of RETURN_TYPES. ComfyUI itself is
not needed; its two modules that nodes may use are stand-ins.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from var_deploy.errors import UsageError, VarDeployError
from var_deploy.pipeline import Pipeline

torch = pytest.importorskip("torch", reason="torch is not installed, which ComfyUI comes with")

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
OWN = ("VAR_DEPLOY_PIPELINE", "VAR_DEPLOY_SETTINGS")
KINDS = ("STRING", "INT", "FLOAT", "BOOLEAN", "IMAGE", "MASK", *OWN)
DEFAULTS = {"STRING": str, "INT": int, "FLOAT": float, "BOOLEAN": bool}


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, Any]]:
    """The classes by name, imported as ComfyUI imports a folder of custom_nodes: from its path."""
    name = "custom_nodes_var_deploy"
    spec = importlib.util.spec_from_file_location(
        name, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    yield module.NODE_CLASS_MAPPINGS
    for key in [key for key in sys.modules if key.partition(".")[0] == name]:
        del sys.modules[key]


@pytest.fixture(scope="module")
def bundle(nodes: dict[str, Any], pocket_bundle: Path) -> Iterator[Pipeline]:
    (pipe,) = run(
        nodes["VarDeployLoadBundle"], folder=str(pocket_bundle), precision="fp32", backend="auto"
    )
    with pipe:
        yield pipe


def run(node: Any, **inputs: Any) -> tuple[Any, ...]:
    """Call a node as ComfyUI does: defaults of its fields, then what is connected."""
    fields = node.INPUT_TYPES()
    known = {**fields["required"], **fields.get("optional", {})}
    assert inputs.keys() <= known.keys()
    given = {
        name: field[1]["default"]
        for name, field in fields["required"].items()
        if len(field) > 1 and "default" in field[1]
    }
    result: tuple[Any, ...] = getattr(node(), node.FUNCTION)(**{**given, **inputs})
    assert isinstance(result, tuple) and len(result) == len(node.RETURN_TYPES)
    return result


def test_the_interface(nodes: dict[str, Any]) -> None:
    for node in nodes.values():
        assert node.CATEGORY == "var-deploy" and node.DESCRIPTION and node.__doc__
        assert all(kind in KINDS for kind in node.RETURN_TYPES)
        fields = node.INPUT_TYPES()
        assert "required" in fields and fields.keys() <= {"required", "optional"}
        arguments = inspect.signature(getattr(node, node.FUNCTION)).parameters
        keywords = any(p.kind is p.VAR_KEYWORD for p in arguments.values())
        for name, (kind, *rest) in {**fields["required"], **fields.get("optional", {})}.items():
            assert keywords or name in arguments, (node, name)
            options = rest[0] if rest else {}
            if isinstance(kind, list):  # a menu
                assert options["default"] in kind
            else:
                assert kind in KINDS, (node, name)
                if "default" in options:
                    assert isinstance(options["default"], DEFAULTS[kind])
        for name in fields.get("optional", {}):
            assert keywords or arguments[name].default is not inspect.Parameter.empty


def test_a_batch_of_a_class(nodes: dict[str, Any], bundle: Pipeline) -> None:
    (settings,) = run(nodes["VarDeploySettings"], cfg="1:3", top_k="50")
    (image,) = run(
        nodes["VarDeployGenerateFromClass"],
        bundle=bundle,
        label="star, 3",
        seed=7,
        batch=3,
        settings=settings,
    )
    assert image.dtype == torch.float32 and image.shape == (3, 64, 64, 3)
    scales = bundle.manifest.model.scales
    ramp = [1 + 2 * k / (scales - 1) for k in range(scales)]
    expected = bundle.generate(["star", 3], 7, count=3, cfg=ramp, top_k=50)
    np.testing.assert_array_equal((image.numpy() * 255).round().astype(np.uint8), expected)


def test_an_edit_keeps_what_is_not_masked(nodes: dict[str, Any], bundle: Pipeline) -> None:
    photo = bundle.generate(["house"], 3)
    image = torch.from_numpy(np.asarray(photo, np.float32) / 255)
    mask = torch.zeros(1, 64, 64)
    mask[:, 8:56, 8:40] = 1
    (found,) = run(
        nodes["VarDeployEdit"], bundle=bundle, image=image, mask=mask, what="sun", seed=5, batch=2
    )
    expected = bundle.edit(
        photo[0].view(np.ndarray), mask[0].numpy() > 0, "sun", 5, count=2, keep_pixels=True
    )
    np.testing.assert_array_equal((found.numpy() * 255).round().astype(np.uint8), expected)
    assert (found[:, :, 60:] == image[:, :, 60:]).all()
    assert (found[0] != found[1]).any()


def test_a_prompt(nodes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed, so nothing can be exported here")
    from text_case import HEIGHT, WIDTH, export_text_bundle

    folder = export_text_bundle(tmp_path_factory.mktemp("comfyui"))
    (pipe,) = run(nodes["VarDeployLoadBundle"], folder=str(folder))
    with pipe:
        words = {"prompt": "a cat", "negative": "a dog", "seed": 4, "batch": 2}
        (image,) = run(nodes["VarDeployGenerateFromPrompt"], bundle=pipe, **words)
        assert image.shape == (2, HEIGHT, WIDTH, 3)
        expected = pipe.generate(None, 4, prompts=["a cat"], negative="a dog", count=2)
        np.testing.assert_array_equal((image.numpy() * 255).round().astype(np.uint8), expected)
        mask = torch.ones(1, HEIGHT, WIDTH)
        (edited,) = run(nodes["VarDeployEdit"], bundle=pipe, image=image, mask=mask, what="a cow")
        assert edited.shape == (1, HEIGHT, WIDTH, 3)
        with pytest.raises(UsageError, match="takes prompts"):
            run(nodes["VarDeployGenerateFromClass"], bundle=pipe)


def test_what_is_refused_is_told(nodes: dict[str, Any], bundle: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(VarDeployError, match="is not a bundle"):
        run(nodes["VarDeployLoadBundle"], folder=str(tmp_path))
    with pytest.raises(UsageError, match="no class is called 'cat'"):
        run(nodes["VarDeployGenerateFromClass"], bundle=bundle, label="cat")
    with pytest.raises(UsageError, match="takes labels, not prompts"):
        run(nodes["VarDeployGenerateFromPrompt"], bundle=bundle, prompt="a cat")
    with pytest.raises(UsageError, match="a ramp has two ends"):
        run(nodes["VarDeployGenerateFromClass"], bundle=bundle, settings={"cfg": "1:2:3"})


def test_a_changed_bundle_is_loaded_again(
    nodes: dict[str, Any], bundle: Pipeline, pocket_bundle: Path
) -> None:
    load = nodes["VarDeployLoadBundle"]
    assert load.IS_CHANGED(folder=str(pocket_bundle), precision="fp32") == bundle.manifest.digest()


class StoppedError(Exception):
    """Stands for the error that ComfyUI raises in a node whose run was cancelled."""


def test_progress_previews_and_cancel(
    nodes: dict[str, Any], bundle: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, int, tuple[str, Image.Image, int]]] = []
    stop_at = [100]

    class ProgressBar:
        def __init__(self, total: int) -> None:
            assert total == bundle.manifest.model.scales

        def update_absolute(self, value: int, total: int, preview: Any) -> None:
            shown.append((value, total, preview))

    def throw_exception_if_processing_interrupted() -> None:
        if len(shown) >= stop_at[0]:
            raise StoppedError

    comfy = types.ModuleType("comfy")
    utils, management = types.ModuleType("comfy.utils"), types.ModuleType("comfy.model_management")
    utils.ProgressBar = ProgressBar  # type: ignore[attr-defined]
    management.throw_exception_if_processing_interrupted = throw_exception_if_processing_interrupted
    for module in (comfy, utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    (image,) = run(nodes["VarDeployGenerateFromClass"], bundle=bundle, label="sun", seed=2)
    scales = bundle.manifest.model.scales
    assert [entry[:2] for entry in shown] == [(k + 1, scales) for k in range(scales)]
    form, last, _ = shown[-1][2]
    assert form == "JPEG"
    np.testing.assert_array_equal(np.asarray(last), (image[0].numpy() * 255).round())
    shown.clear()
    stop_at[0] = 2
    with pytest.raises(StoppedError):
        run(nodes["VarDeployGenerateFromClass"], bundle=bundle, label="sun", seed=2)
    assert len(shown) == 2
    stop_at[0] = 100  # the pipeline goes on
    (again,) = run(nodes["VarDeployGenerateFromClass"], bundle=bundle, label="sun", seed=2)
    assert (again == image).all()
