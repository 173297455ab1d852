"""Running a model without leaving a trace, one thread at a time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# Shared modules, forward hooks and torch's own global switches are not thread-safe: products of
# all operators take turns. Re-entrant, because a user's loss may itself use an operator.
LOCK = threading.RLock()


@contextmanager
def evaluation(model: torch.nn.Module, *, training: bool, device: torch.device) -> Iterator[None]:
    """Run the body with the model in the mode asked for; put everything back afterwards.

    The body sees gradients enabled, no autocast, and scaled-dot-product attention made of
    operations that can be differentiated twice. Restored: the mode of every submodule, the random
    state of the CPU and of `device`, and in training mode the buffers.
    """
    with LOCK:
        modes = [(module, module.training) for module in model.modules()]
        cpu_state = torch.get_rng_state()
        device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        buffers = [(b, b.detach().clone()) for b in model.buffers()] if training else []
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(device.type, enabled=False),
                sdpa_kernel(SDPBackend.MATH),
            ):
                if any(mode != training for _, mode in modes):
                    model.train(training)
                yield
        finally:
            for module, mode in modes:
                module.training = mode
            torch.set_rng_state(cpu_state)
            if device_state is not None:
                torch.cuda.set_rng_state(device_state, device)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Keep to itself that torch loops over what it cannot batch: nobody could do better."""
    with warnings.catch_warnings():  # inside `evaluation`: one thread at a time
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


def seed(value: int, device: torch.device) -> None:
    """Fix the random numbers of the next forward pass (inside `evaluation`)."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(value)


def check_independent(model: torch.nn.Module, *, training: bool) -> None:
    """Raise ValueError where a layer makes one sample's loss or gradient depend on others."""
    for name, module in model.named_modules():
        if getattr(module, "scale_grad_by_freq", False) and any(
            p.requires_grad for p in module.parameters(recurse=False)
        ):
            msg = (
                f"{type(module).__name__} {name!r} divides gradients by how often a word is in "
                "the batch (scale_grad_by_freq=True): these are no derivatives, and no sample "
                "has its own; set scale_grad_by_freq=False"
            )
            raise ValueError(msg)
        if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            continue
        if training or module.running_mean is None:
            why = "in training mode" if training else "without running statistics"
            remedy = "use training=False" if training else "use track_running_stats=True"
            msg = (
                f"{type(module).__name__} {name!r} {why} normalises by the batch, so that no "
                f"sample has a loss of its own; {remedy}, or another normalisation"
            )
            raise ValueError(msg)
