"""The proof of a compaction: how near the outputs of the compacted network are to those of the masked one."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.core import schema


@dataclass(frozen=True)
class Proof:
    """The comparison of a compacted network with the masked one.

    Args:
        precision: The type that both computed in: ``"float64"``; where the model fixes another type,
            ``"float32"`` or, if it does not run in that either, ``"the types of the model"``.
        difference: The largest difference of two outputs, relative to the largest absolute value of the tensor.
        passes: How many passes were compared: on the example, in other modes and steps, on other inputs.
        tensors: How many output tensors these passes have given.
    """

    precision: str
    difference: float
    passes: int
    tensors: int

    def __str__(self) -> str:
        return (
            f"proof: {self.tensors} outputs of {self.passes} passes differ from those of the masked network by"
            f" {self.difference:.1e} of the largest at most, in {self.precision}"
        )


PROOF = schema.dataclass_of(
    Proof,
    precision=schema.string,
    difference=schema.number("a number of at least 0", lambda value: value >= 0),
    passes=schema.integer(1),
    tensors=schema.integer(1),
)
