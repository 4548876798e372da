"""The structure of whole experts of a mixture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_prune.channels.compaction.mixtures import analyse_experts
from lightning_prune.core.probes import Probe
from lightning_prune.structures.coupled import Coupled
from lightning_prune.units.groups import UnitGroup, Units


@dataclass(frozen=True, repr=False)
class Experts(Coupled):
    """Whole experts of a mixture: all weights of one are a unit.

    An expert that goes gives zeros. The router keeps its outputs and chooses among all experts as before: what
    it sends to one that is gone adds nothing to the token, and the shares of the others stay as they are.
    Retraining teaches the router to send tokens elsewhere. The masked and the compacted network are equal,
    which they would not be if the router chose among those that are left.

    A mixture is found in passes on an example, and passes a trial cut before anything may go. It is a list of
    modules of one kind (``nn.ModuleList``, ``nn.ModuleDict``) beside a router: a module that runs before it, or
    a matrix of the module that holds it, with one number for each expert. Each expert has to give zeros of the
    shape of its input when its weights are 0. Or it is one module that holds the weights of all experts,
    stacked along the first dimension, and is called with their numbers, as in Hugging Face's models. Lu et al.
    2024, "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large
    Language Models", ACL; the criterion there is another one.

    Args:
        include: Glob pattern over parameter and module names, or class of modules, or several of these, as for
            :class:`Unstructured`. With it, only mixtures with a matching parameter or module are pruned; also
            those that do not train.
        exclude: The same, for mixtures that are not pruned.
        round_to: The number of experts that a mixture keeps is a multiple of this, unless it keeps all: as
            where experts are divided among processes.
        minimum: How many experts each mixture keeps at least: a number or, below 1, a share. It may be less
            than the number that each token is sent to.
        max_seconds: Time limit to find the experts and to try each cut, in seconds.

    Raises:
        ValueError: If a pattern is neither a string nor a class, or a number is out of range.
    """

    def search(self, model: nn.Module, probe: Probe) -> Units:
        """Return one group for each mixture of experts that trial cuts confirm."""
        return analyse_experts(model, probe, self.max_seconds)

    def includes(self, group: UnitGroup) -> bool:
        """Return True: all groups are mixtures."""
        return True

    def sizes(self, group: UnitGroup) -> set[int]:
        """Return 1: a unit is one expert."""
        return {1}
