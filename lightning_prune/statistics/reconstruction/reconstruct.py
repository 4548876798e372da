"""Reconstruct: the setting by which the weights that are left make up for those that went."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.core.parts import Part, check_counts, is_number


@dataclass(frozen=True, repr=False)
class Reconstruct(Part):
    """Gives the weights that are left new values after an event, by least squares, layer by layer.

    Each layer that has lost inputs or weights gets the weights that best give, on calibration batches, the
    outputs that it gave before the event, from the inputs that it gets now: those of the pruned network, in
    which the layers before it have their new weights. ``|X W^T - Y|^2 + ridge d |W - W0|^2`` is minimized, with
    W0 the weights before, d the mean over the inputs of the sum of their squares, and masked entries at 0.
    Where outputs go into a sum and nowhere else, as at the end of a residual block, Y is what gives the sum of
    before: the layer makes up for what the other terms have changed, too. A batch norm may come before the sum.
    A bias is solved for along with the weights, a frozen one, too; where there is none, and a batch norm alone
    reads the outputs, its running mean takes the shift. From the first of these layers on, batch norms in
    training mode normalize by the statistics of each batch, as in training, and their running statistics become
    those of the calibration batches; others, and ``nn.SyncBatchNorm``, keep theirs. Neither labels nor
    gradients are used.

    Layers are those of the kinds ``nn.Linear``, all convolutions, Hugging Face's ``Conv1D``, the projections of
    ``nn.MultiheadAttention``, and the weights by which the first layer of a recurrent module multiplies its
    input, with torch's own ``forward``; what is left alone is in the report, with the reason.

    Where whole inputs go, and where single weights of small layers do, the solution is exact; in large layers
    columns make up for each other in turn. No layer is left with a larger error than before, nor is the
    network: if its outputs on the calibration data came no nearer, all weights stay. He, Zhang and Sun 2017,
    "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv 1707.06168; Frantar and Alistarh 2023,
    "SparseGPT", arXiv 2301.00774.

    Args:
        batches: How many training batches a fit keeps for it, the first ones, at least 1. They are in its
            checkpoints. In a loop of your own the batches that are given to ``prune`` count.
        ridge: Weight of the difference from the weights before, at least 0. With fewer rows of calibration data
            than a layer has inputs it is multiplied by inputs / rows, with a warning.
        positions: How many positions of a feature map count for each image, at least 1.
        max_gigabytes: Memory that the solution for one layer may take, in 10^9 bytes, above 0. A layer that
            would take more is left alone.

    Raises:
        ValueError: If an argument is out of range.
    """

    batches: int = 8
    ridge: float = 1e-3
    positions: int = 40
    max_gigabytes: float = 4.0

    def __post_init__(self) -> None:
        check_counts(batches=self.batches, positions=self.positions)
        if not is_number(self.ridge) or self.ridge < 0:
            raise ValueError(f"ridge={self.ridge!r} must be a number of at least 0.")
        if not is_number(self.max_gigabytes) or self.max_gigabytes <= 0:
            raise ValueError(f"max_gigabytes={self.max_gigabytes!r} must be a number above 0.")
