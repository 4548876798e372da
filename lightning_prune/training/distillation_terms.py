"""The term that distillation adds to a loss, its gradient, and the tensor that it compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_prune.core.parts import is_integer, is_number

_LOSSES = ("kl", "mse")


@dataclass(frozen=True)
class DistillationTerm:
    """A distance of a network's output from that of its teacher.

    Args:
        loss: ``"kl"`` or ``"mse"``.
        weight: The factor of the term's gradient.
        temperature: The temperature of both softmaxes of ``"kl"``.
        dim: The dimension of the classes; ``None`` for the second one of two.

    Raises:
        ValueError: If an argument is not what :class:`Distillation` allows.
    """

    loss: Literal["kl", "mse"]
    weight: float
    temperature: float
    dim: int | None

    def __post_init__(self) -> None:
        if self.loss not in _LOSSES:
            raise ValueError(f"loss={self.loss!r} must be one of {', '.join(map(repr, _LOSSES))}.")
        for name, value in (("weight", self.weight), ("temperature", self.temperature)):
            if not is_number(value) or value <= 0:
                raise ValueError(f"{name}={value!r} must be a finite number greater than 0.")
        if self.dim is not None and not is_integer(self.dim):
            raise ValueError(f"dim={self.dim!r} must be the number of a dimension, or None.")

    def value_and_gradient(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the term, and its gradient with respect to the student's output, times ``weight``.

        Both are computed in single precision at least.

        Args:
            student: Output of the network that is trained.
            teacher: Output of its teacher on the same input.

        Raises:
            ValueError: If the outputs differ in shape, or have no dimension of classes.
        """
        if student.shape != teacher.shape:
            raise ValueError(
                f"the teacher's output has the shape {tuple(teacher.shape)}, that of the network"
                f" {tuple(student.shape)}: Distillation compares outputs of one shape."
            )
        dtype = torch.promote_types(student.dtype, torch.float32)
        with torch.enable_grad(), torch.autocast(student.device.type, enabled=False):
            own = student.detach().to(dtype).requires_grad_()
            value = self._value(own, teacher.detach().to(dtype))
            (gradient,) = torch.autograd.grad(value, own)
        return value.detach(), self.weight * gradient

    def _value(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.loss == "mse":
            return F.mse_loss(student, teacher)
        dim = self._classes(student)
        wanted = (teacher / self.temperature).log_softmax(dim)
        given = (student / self.temperature).log_softmax(dim)
        # a class that is ruled out has logits of -inf in both
        terms = (wanted.exp() * (wanted - given)).masked_fill(wanted == -torch.inf, 0)
        return terms.sum() * (self.temperature**2 * student.shape[dim] / max(1, student.numel()))

    def _classes(self, student: Tensor) -> int:
        shape, dim = tuple(student.shape), self.dim
        if dim is None and len(shape) != 2:
            raise ValueError(
                f"dim=None: an output of shape {shape} does not show which dimension the classes are in. Give"
                " dim=1 if it is the second one, as for cross_entropy, dim=-1 if it is the last one, as in"
                " language models, or loss='mse' if there are no classes."
            )
        dim = 1 if dim is None else dim
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"dim={dim} must be a dimension of the output, which has the shape {shape}.")
        if shape[dim] < 2:
            raise ValueError(
                f"loss='kl' compares two classes or more, and dimension {dim} of an output of shape {shape} has"
                f" {shape[dim]}: give another dim, or loss='mse'."
            )
        return dim


def compared_tensor(output: Any, place: str) -> Tensor:
    """Return the tensor of an output that distillation compares.

    It is the output itself, its entry or attribute ``logits``, or the only floating-point tensor in it.

    Args:
        output: What a module has returned.
        place: Names the module in error messages.

    Raises:
        ValueError: If there is no such tensor, or more than one.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    leaves = [logits] if isinstance(logits, Tensor) else tree_leaves(output)
    found = [each for each in leaves if isinstance(each, Tensor) and each.is_floating_point()]
    if len(found) != 1:
        raise ValueError(
            f"{place} returns a {type(output).__name__} with {len(found)} floating-point tensors, and"
            " Distillation compares one: return one, or name one 'logits' in a mapping or as an attribute, or"
            " give a module=... that returns one."
        )
    return found[0]
