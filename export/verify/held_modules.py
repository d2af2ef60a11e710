"""PyTorch modules that the user holds: what their attributes tell, and their own forward.

The published code's classes are known by their interface, never by their names:

    transformer.forward(label_B, x_BLCv)       teacher-forced logits [B, T, V]
    tokenizer.img_to_idxBl(image)              tokens of every scale; or `encode`
    tokenizer.idxBl_to_img(tokens, …)          their image; or `fhat_to_img` or `decode` of f_hat
    tokenizer.quantize.idxBl_to_var_input(tokens)   x_BLCv; or `teacher_input` of either

Images are [B, C, S, S] in [-1, 1]. What a module lacks is computed with the modules of
`export.models`, which hold its weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from var_deploy.errors import UsageError, one_line
from var_deploy.export.checkpoint.files import WeightSource
from var_deploy.export.checkpoint.hints import Hints
from var_deploy.export.checkpoint.recognise import recognise
from var_deploy.export.var import ImageDecoder, ImageEncoder
from var_deploy.spec import ModelSpec

ENCODE = ("img_to_idxBl", "encode")
DECODE = ("fhat_to_img", "decode")


def tokenizer_of(module: nn.Module) -> nn.Module:
    """Return the tokenizer in the result of `var.build_tokenizer`; any other module as it is."""
    return module.tokenizer if isinstance(module, (ImageEncoder, ImageDecoder)) else module


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of torch.compile and of parallel training."""
    while True:
        wrapped = getattr(module, "_orig_mod", None)
        if wrapped is None and type(module).__module__.startswith("torch."):
            wrapped = getattr(module, "module", None)
        if not isinstance(wrapped, nn.Module):
            return module
        module = wrapped


def recognise_modules(
    transformer: nn.Module,
    tokenizer: nn.Module,
    tokenizer_weights: WeightSource,
    transformer_weights: WeightSource,
) -> ModelSpec:
    """Recognise the sizes of two modules of any classes.

    Sizes come from their state dicts, as in `recognise`. Those that state dicts do not tell come
    from attributes: `patch_nums`, `num_heads`, `eps` of the LayerNorms, `resi_ratio` of φ.

    Raises CheckpointError and UsageError as `recognise` does, and UsageError for attributes that
    ask for what the graphs do not compute.
    """
    transformer, tokenizer = unwrapped(transformer), unwrapped(tokenizer)
    if _values(tokenizer, "using_znorm") - {False}:
        raise UsageError(
            f"{type(tokenizer).__name__} compares normalised codes (using_znorm), expected "
            "Euclidean distance, which the graphs compute"
        )
    sides = getattr(transformer, "patch_nums", None)
    heads = _one(transformer, "num_heads") or _one(transformer, "heads")
    told = Hints(patch_nums=tuple(map(int, sides)) if sides else None, heads=heads)
    spec = recognise(tokenizer_weights, transformer_weights, fallback=told)
    data = spec.to_json()
    norms = [m for m in transformer.modules() if isinstance(m, nn.LayerNorm)]
    if eps := {norm.eps for norm in norms}:
        data["transformer"]["norm_eps"] = _only(transformer, "eps", eps)
    if (ratio := _one(tokenizer, "resi_ratio")) is not None:
        data["tokenizer"]["phi_ratio"] = ratio
    return ModelSpec.from_json(data)


def _values(module: nn.Module, name: str) -> set[Any]:
    """Return the values that the module and its submodules have under an attribute's name."""
    found = (getattr(m, name, None) for m in module.modules())
    return {value for value in found if isinstance(value, (int, float))}


def _one(module: nn.Module, name: str) -> Any:
    values = _values(module, name)
    return _only(module, name, values) if values else None


def _only(module: nn.Module, name: str, values: set[Any]) -> Any:
    if len(values) > 1:
        listed = ", ".join(map(str, sorted(values)))
        raise UsageError(
            f"{type(module).__name__} has several values of {name} ({listed}), expected one"
        )
    return next(iter(values))


class OwnForward:
    """Runs the user's transformer and tokenizer with their own code.

    Calls happen in evaluation mode, without gradients, autocast, label dropout or TF32, on the
    device where the modules are; all of it is put back afterwards. Results are on the CPU, in
    fp32. Raises UsageError for modules that are not fp32, and for a call that fails or whose
    result has another shape than the interface says.

    Attributes:
        name: class and module of the transformer, such as "models.var.VAR".
    """

    def __init__(self, transformer: nn.Module, tokenizer: nn.Module, spec: ModelSpec) -> None:
        self._transformer = transformer
        self._tokenizer = tokenizer_of(tokenizer)
        self._spec = spec
        plain = type(unwrapped(transformer))
        self.name = f"{plain.__module__}.{plain.__qualname__}"
        for module in (self._transformer, self._tokenizer):
            kinds = {p.dtype for p in module.parameters() if p.is_floating_point()}
            if kinds - {torch.float32}:
                found = str(min(kinds - {torch.float32}, key=str)).removeprefix("torch.")
                raise UsageError(
                    f"{type(module).__name__} has {found} parameters, expected float32, in which "
                    "graphs are compared: give copy.deepcopy(module).float()"
                )
        self._encode = self._method(ENCODE)
        self._decode = self._method(DECODE)

    def _method(self, names: Sequence[str]) -> Callable[..., Any]:
        plain = unwrapped(self._tokenizer)
        for name in names:
            if callable(method := getattr(plain, name, None)):
                return method  # type: ignore[no-any-return]
        raise UsageError(
            f"{type(plain).__name__} has no method {' or '.join(names)}, expected a tokenizer "
            "with the interface of the published VQVAE"
        )

    def logits(self, labels_G: Tensor, teacher_GLC: Tensor) -> Tensor:
        """Return teacher-forced logits [G, T, V] of G rows, from the inputs of scales 1..K-1."""
        found = self._call(self._transformer, self._transformer, labels_G, teacher_GLC)
        spec = self._spec
        shape = (len(labels_G), spec.total_tokens, spec.tokenizer.vocab_size)
        return self._checked(self._transformer, "forward", found, shape).float()

    def teacher_input(self, tokens: Sequence[Tensor]) -> Tensor | None:
        """Return x_BLCv of the tokens of all scales; None where neither module computes it."""
        tokenizer, transformer = unwrapped(self._tokenizer), unwrapped(self._transformer)
        quantize = getattr(tokenizer, "quantize", None)
        for owner, name in (
            (quantize, "idxBl_to_var_input"),
            (transformer, "teacher_input"),
            (tokenizer, "teacher_input"),
        ):
            if callable(method := getattr(owner, name, None)):
                spec = self._spec
                shape = (len(tokens[0]), spec.total_tokens - 1, spec.input_width)
                module = self._transformer if owner is transformer else self._tokenizer
                found = self._call(module, method, list(tokens))
                return self._checked(module, name, found, shape).float()
        return None

    def encode(self, image: Tensor) -> list[Tensor]:
        """Encode images [B, C, S, S] in [-1, 1] → tokens [B, L_k] of every scale."""
        found = self._call(self._tokenizer, self._encode, image)
        name, lengths = self._encode.__name__, self._spec.scale_lengths
        if not isinstance(found, (list, tuple)) or len(found) != len(lengths):
            raise UsageError(
                f"{type(self._tokenizer).__name__}.{name} gave {_described(found)}, expected a "
                f"list of {len(lengths)} tensors, the tokens of each scale"
            )
        pairs = zip(found, lengths, strict=True)
        checked = (self._checked(self._tokenizer, name, t, (len(image), n)) for t, n in pairs)
        return [tokens.to(torch.int64) for tokens in checked]

    def decode(self, f_hat: Tensor) -> Tensor:
        """Decode f_hat [B, Cv, p_K, p_K] → images [B, C, S, S] in [-1, 1]."""
        return self._image(self._decode, f_hat)

    def decode_tokens(self, tokens: Sequence[Tensor]) -> Tensor | None:
        """Decode tokens of all scales → images; None where the tokenizer decodes f_hat alone."""
        method = getattr(unwrapped(self._tokenizer), "idxBl_to_img", None)
        if not callable(method):
            return None
        return self._image(method, list(tokens), same_shape=True, last_one=True)

    def _image(self, method: Callable[..., Any], arguments: Any, **options: Any) -> Tensor:
        t = self._spec.tokenizer
        found = self._call(self._tokenizer, method, arguments, **options)
        batch = len(arguments[0]) if isinstance(arguments, list) else len(arguments)
        shape = (batch, t.image_channels, t.image_side, t.image_side)
        return self._checked(self._tokenizer, method.__name__, found, shape).float()

    def _call(
        self, module: nn.Module, method: Callable[..., Any], *arguments: Any, **options: Any
    ) -> Any:
        device = next(module.parameters()).device

        def placed(value: Any) -> Any:
            return [t.to(device) for t in value] if isinstance(value, list) else value.to(device)

        with _in_use(module, device):
            try:
                return method(*map(placed, arguments), **options)
            except Exception as error:  # the user's code may raise any exception
                name = "forward" if method is module else getattr(method, "__name__", "call")
                raise UsageError(
                    f"{type(module).__name__}.{name} failed: {type(error).__name__}: "
                    f"{one_line(error)}"
                ) from error

    def _checked(self, module: nn.Module, name: str, found: Any, shape: tuple[int, ...]) -> Tensor:
        if not isinstance(found, Tensor) or tuple(found.shape) != shape:
            raise UsageError(
                f"{type(module).__name__}.{name} gave {_described(found)}, expected {list(shape)}"
            )
        return found.detach().cpu()


def _described(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


@contextlib.contextmanager
def _in_use(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a module into evaluation mode for a call; its flags and label dropout are restored
    afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    # the published forward drops labels in evaluation mode as well
    dropping: list[tuple[Any, Any]] = [
        (m, m.cond_drop_rate) for m, _ in modes if hasattr(m, "cond_drop_rate")
    ]
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    plain = torch.autocast(device_type=device.type, enabled=False)
    try:
        module.eval()
        for m, _ in dropping:
            m.cond_drop_rate = 0.0
        with torch.no_grad(), exact, plain:
            yield
    finally:
        for m, rate in dropping:
            m.cond_drop_rate = rate
        for m, training in modes:
            m.training = training
