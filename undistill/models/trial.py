"""A network is tried in every way in which it will be used, before anything is trained."""

import warnings
from copy import deepcopy

import torch
from torch import Tensor, nn

from undistill.core.errors import ModelError
from undistill.core.seeds import seeded
from undistill.core.spec import Spec
from undistill.core.unshown import LOG_ZERO, UNSHOWN

Shape = tuple[int, int, int]  # channels, height, width
AGREES = 1e-3  # largest difference of two answers that are the same but for rounding, relative to the largest logit


def require_copyable(network: nn.Module, name: str) -> None:
    """Raise `ModelError` for networks that cannot be copied, or are not made of Python, and say which way leads on."""
    if isinstance(network, torch.jit.ScriptModule):
        raise ModelError(
            f"{name} returned a TorchScript module, which cannot be trained or copied as a network of Python can. "
            "Return the nn.Module from which it was made, and load its weights into that."
        )
    for part, module in network.named_modules():
        hooks = [type(hook) for hook in module._forward_pre_hooks.values()]
        if any(hook.__module__ == "torch.nn.utils.weight_norm" for hook in hooks):
            raise ModelError(
                f"{name}: {part or 'the network'} uses torch.nn.utils.weight_norm, with which torch cannot copy a "
                "network; use torch.nn.utils.parametrizations.weight_norm instead."
            )


def check(network: nn.Module, shape: Shape, num_classes: int, name: str, *, finite: bool = True) -> None:
    """Raise `ModelError` unless `network` maps (2, C, H, W) images to finite (2, K) logits, trained or in training.

    It is also tried whether it can be copied and stored, leaves its input as it is, and has gradients.
    """
    if not isinstance(network, nn.Module):
        raise ModelError(f"{name} returned {type(network).__name__}; a factory must return a torch.nn.Module.")
    _require_tensors(network, name)
    blank = torch.zeros(2, *shape, device=device_of(network))
    try:
        trial = deepcopy(network)  # a forward pass in training mode changes batch-norm statistics
        with torch.no_grad():
            answers = {mode: trial.train(mode == "training")(blank) for mode in ("training", "eval")}
    except Exception as error:
        raise ModelError(
            f"{name} failed on images of shape {shape} (channels, height, width): {type(error).__name__}: {error}"
        ) from error
    for mode, logits in answers.items():
        if not isinstance(logits, Tensor) or logits.shape != (2, num_classes) or not logits.is_floating_point():
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(
                f"{name} answers two images with {found} in {mode} mode; for {num_classes} classes it must return "
                f"logits of shape (2, {num_classes})."
            )
    if finite and not answers["eval"].isfinite().all():
        raise ModelError(f"{name} answers a blank image with NaN or infinity; its weights are not usable.")
    if blank.any():
        raise ModelError(
            f"{name} changes the images that it is given, in place (x.sub_, x /= ...). Others see them after it; write "
            "x = x - mean instead of x.sub_(mean)."
        )
    _require_gradients(trial, shape, name)


def _require_tensors(network: nn.Module, name: str) -> None:
    for part, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{name} keeps {part.removesuffix('_extra_state') or 'extra state'} outside of tensors "
                f"(get_extra_state returns {type(value).__name__}), which cannot be stored so that reading executes "
                "nothing; keep it in a buffer: self.register_buffer('name', tensor)."
            )


def _require_gradients(trial: nn.Module, shape: Shape, name: str) -> None:
    """Attacks and defences need gradients, with respect to weights, or to images."""
    images = torch.full((2, *shape), 0.5, device=device_of(trial), requires_grad=True)
    try:
        with torch.enable_grad():
            answers = trial.eval()(images)
            if answers.requires_grad:
                answers.sum().backward()
    except Exception as error:
        raise ModelError(
            f"{name} answers, but has no gradient with respect to its images, which attacks without data need: "
            f"{type(error).__name__}: {error}"
        ) from error


def require_whole(network: nn.Module, other: nn.Module, shape: Shape, name: str) -> None:
    """Raise `ModelError` if `network` keeps something that it needs outside of its state dict.

    `other` is a network of the same kind, initialised by another seed. With the weights of `network` it must answer
    as that does, after both have seen a batch in training.
    """
    if varies(network, shape):
        return
    trained, again = deepcopy(network), deepcopy(other)
    device = device_of(network)
    with torch.no_grad(), seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained.train()(torch.rand(8, *shape, device=device))
        again.load_state_dict(trained.state_dict())
        images = torch.rand(8, *shape, device=device)
        ours, theirs = trained.eval()(images), again.eval()(images)
    if not agree(ours, theirs):
        outside = ", ".join(sorted(_outside(trained))[:3])
        raise ModelError(
            f"{name} keeps something that it needs outside of its weights{f' (such as {outside})' * bool(outside)}: "
            "another network with the same state dict answers otherwise, so what is stored would not be what was "
            "measured. Register it: self.register_buffer('name', tensor)."
        )


def require_as_measured(network: nn.Module, opened: nn.Module, images: Tensor, name: str) -> None:
    """Raise `ModelError` unless `opened`, read again from its run, answers `images` as `network` does."""
    with torch.no_grad():
        ours, theirs = network.eval()(images), opened.to(device_of(network)).eval()(images)
        if agree(ours, theirs) or not agree(ours, network(images)):
            return
    raise ModelError(
        f"{name} was stored, read again, and answers otherwise than what was measured: it keeps something outside "
        "of its state dict that training changes. Register it: self.register_buffer('name', tensor)."
    )


def _outside(network: nn.Module) -> set[str]:
    """Attributes that hold numbers and are in no state dict."""
    held = network.state_dict().keys()
    found = set()
    for part, module in network.named_modules():
        prefix = f"{part}." * bool(part)
        buffers = {name for name, value in module._buffers.items() if value is not None}
        plain = {name for name, value in vars(module).items() if hasattr(value, "shape") or type(value) is float}
        found |= {prefix + name for name in (buffers | plain) if prefix + name not in held}
    return found


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether networks that two seeds initialised have the same weights, as where a factory loads them from a file."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    drawn = [(ours, theirs) for ours, theirs in pairs if ours.ndim > 1]  # others begin as zeros or ones
    return bool(drawn) and all(torch.equal(ours, theirs) for ours, theirs in drawn)


def varies(network: nn.Module, shape: Shape) -> bool:
    """Whether a network in eval mode answers the same images in different ways."""
    trial = deepcopy(network).eval()
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)).to(device_of(network))
    with torch.no_grad():
        return not agree(trial(images), trial(images))


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two answers are the same but for rounding: what they show, and every number of it."""
    hidden = one == UNSHOWN
    if not torch.equal(hidden, other == UNSHOWN):
        return False
    one, other = (answer.masked_fill(hidden, 0) for answer in (one, other))
    largest = one.masked_fill(one == LOG_ZERO, 0).abs().max().clamp_min(1)  # which stands for 0, and is no scale
    return bool(((one - other).abs().max() <= AGREES * largest).item())


def returned(network: object, by: Spec, shape: Shape, num_classes: int) -> nn.Module:
    """The network that an attack or defence returned; `ModelError` unless it classifies such images."""
    if not isinstance(network, nn.Module):
        raise ModelError(f"{by} returned {type(network).__name__}; it must return the network that it trained.")
    check(network, shape, num_classes, f"The network of {by}", finite=False)
    return network


def device_of(network: nn.Module) -> torch.device:
    """Device of the network's weights; the CPU if it has none."""
    return next((tensor.device for tensor in (*network.parameters(), *network.buffers())), torch.device("cpu"))
