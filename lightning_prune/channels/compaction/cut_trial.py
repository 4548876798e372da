"""Trial cuts on copies of a model, which show for which unit groups a cut leaves the outputs the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.example_variants import variant_that_runs
from lightning_prune.channels.compaction.failures import Failure, OpCounter
from lightning_prune.channels.compaction.plan import Kept
from lightning_prune.channels.compaction.proof import Proof
from lightning_prune.channels.compaction.tolerance import (
    EXACT,
    LARGEST,
    amplifies_rounding,
    largest_difference,
    measured_tolerance,
)
from lightning_prune.channels.compaction.trial_copies import TrialCopies
from lightning_prune.channels.compaction.trial_pass import TrialPass
from lightning_prune.core.model_copies import copy_sharing_weights
from lightning_prune.core.probes import Deadline, NotFollowedError, Probe, relative_difference

_Judge: TypeAlias = Callable[[Kept], Failure | None]  # says why groups cannot be cut together

_WHERE_OUTPUTS_ARE = (
    "let forward return its outputs, or follow a part that has some with Channels(include=...)."
)


class CutTrial:
    """Compares the outputs of a cut copy of a model with those of a masked one.

    Trials run the first pass in single precision, as a quick first check, until :meth:`refine` is called. Where
    values decide shapes, as the scores of boxes do in a detector, they run in double precision from the start:
    rounding might put two boxes in another order.

    Args:
        model: Is not changed.
        passes: The passes to run; the first one has to give the same outputs each time.
        known: Whether they come from the ``passes`` of a refined trial on the same network.
        perturbed: A copy of the model with other weights, for trials of any cut, in which the masked copy has
            the weights of the units at 0. ``None`` if those of the model itself are 0 already where it is to be
            cut.
        deadline: When trials have to end; ``None`` for no limit.

    Attributes:
        proof: The comparison that the last trial has made; ``None`` before the first one.
        passes: The passes, each with what :meth:`refine` has found out of it.

    Raises:
        NotFollowedError: If the model cannot run on the example, or gives different outputs for it each time.
    """

    def __init__(
        self,
        model: nn.Module,
        passes: Sequence[TrialPass],
        *,
        perturbed: nn.Module | None = None,
        known: bool = False,
        deadline: Deadline | None = None,
    ) -> None:
        self._model, self._known, self._deadline = model, known, deadline
        self._written = frozenset[str]().union(*(each.written for each in passes))
        self._copies = TrialCopies(model, perturbed, self._written)
        self._decided = any(each.decided for each in passes)
        self.proof: Proof | None = None
        self.passes = list(passes)
        if known:
            self._copies.dtype = torch.float64 if self._decided else torch.float32
            self._copies.cast = passes[0].cast
            self._take(passes)
        else:
            self._begin()
        self._double_runs = self._copies.dtype is torch.float64
        self._steady = False  # whether the factor of the weights is known to do no harm

    def _begin(self) -> None:
        """Choose the precision of the first trials, and check that the model can be tried in it.

        Raises:
            NotFollowedError: As for the constructor.
        """
        given = self.passes
        types = [(torch.float64, True)] * self._decided + [(torch.float32, True), (torch.float32, False)]
        for dtype, cast in types:  # without a cast they are those that the model's code fixes
            self._copies.begin(dtype, cast=cast)
            try:
                self._take(given)
                first, again = self._first_outputs()
                break
            except NotFollowedError:
                if not cast:
                    raise
        if not first:
            raise NotFollowedError(
                f"{type(self._model).__name__} gives no tensor to compare", _WHERE_OUTPUTS_ARE
            )
        if relative_difference(first, first):
            changes = ", or does when its weights change a little, as in trials of cuts"
            raise NotFollowedError(
                f"the model gives nan for the example{'' if self._copies.masked else changes}: nothing can be"
                " compared with nan."
            )
        if relative_difference(first, again) > LARGEST[torch.float32]:
            raise NotFollowedError(
                "the model gives different outputs for one example: no cut can be tried on it."
            )

    def _take(self, passes: Sequence[TrialPass]) -> None:
        """Take the passes in the precision of the copies; the first one alone runs until they are refined."""
        cast = self._copies.cast
        self.passes = [replace(each.to(self._copies.dtype) if cast else each, cast=cast) for each in passes]
        self._passes = self.passes[:1]

    def _first_outputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs of the first pass, twice.

        Raises:
            NotFollowedError: If it fails or, in double precision, any pass does.
        """
        if self._copies.dtype is torch.float64:  # others are tried later, where a pass does not run in it
            for each in self.passes[1:]:
                self._twice(each)
        return self._twice(self.passes[0])

    def refine(self) -> None:
        """Go on in double precision, if the model runs in it, with all passes and with other inputs.

        Each pass in evaluation mode runs on another batch size, other values and other sizes, as far as the
        model takes them, in training mode if the same ops run there; if the weights are masked, on the example
        as well. If the model does not run in double precision, single precision goes on, and the differences
        that are let pass are those that its rounding errors make.

        Raises:
            NotFollowedError: If a pass fails.
        """
        if not self._known:
            self.passes = [*self.passes[:1], *map(self._checked, self.passes[1:])]
        self.passes = [replace(each, variant=self._variant(each)) for each in self.passes]
        variants = [each.on(each.variant) for each in self.passes if each.variant is not None]
        if self._copies.masked:
            passes = [*(each.on(each.example) for each in self.passes), *variants]
        else:  # first trials ran on the example, or a smaller one, and the model is cut by passes on it
            passes = [each.on(each.variant or each.probe) for each in self.passes]
        self._narrow = passes, self._copies.cast
        self._passes = [each.to(torch.float64) for each in passes]
        self._copies.refine()

    def can_cut(self, kept: Kept) -> bool:
        """Return whether these groups can be cut together."""
        return not kept or self._failure(kept) is None

    def failing(self, kept: Kept, passed: Kept = ()) -> dict[str, Failure]:
        """Return the groups that cannot be cut, name to failure; all others can be cut together.

        All groups are cut at once. If that fails, the first one that fails together with those before it is
        found by bisection; then all others are tried together, and so on. A group that fails before
        :meth:`refine` cannot be cut; one that passes may still fail afterwards.

        Args:
            kept: The groups to test, each with a bool mask over its units, False for a unit to cut.
            passed: Groups that have passed, in the same form, which are cut as well.

        Raises:
            ValueError: If the deadline has passed.
        """
        return _failing(kept, passed, self._failure)

    def raising(self, kept: Kept) -> dict[str, Failure]:
        """Return the groups with which the cut network raises an error, name to failure.

        This takes less time than :meth:`failing`, but outputs are not compared.

        Args:
            kept: As for :meth:`failing`.

        Raises:
            ValueError: If the deadline has passed.
        """
        return _failing(kept, (), self._error)

    def _failure(self, kept: Kept) -> Failure | None:
        """Return why these groups cannot be cut together; ``None`` if they can."""
        if self._deadline is not None:
            self._deadline.check()
        counter = OpCounter()
        try:
            expected, found = self._both(kept, counter)
        except Exception as error:  # a user's forward may raise anything when shapes do not fit
            if self._uses_single_precision(kept):
                return self._failure(kept)
            return Failure.of(error, counter.count)
        return self._judged(kept, expected, found)

    def _judged(
        self, kept: Kept, expected: Sequence[list[Tensor]], found: Sequence[list[Tensor]]
    ) -> Failure | None:
        """Return why outputs of the masked and of the cut copy do not agree; ``None`` if they do."""
        if largest_difference(expected, expected):  # nan
            if self._copies.scale == 1 and not self._falls_back():
                return Failure("cannot be compared: the network gives nan")
            self._copies.scale = 1
            return self._failure(kept)
        self._double_runs |= self._copies.dtype is torch.float64
        difference = largest_difference(expected, found)
        precision = (
            str(self._copies.dtype).removeprefix("torch.") if self._copies.cast else "the types of the model"
        )
        self.proof = Proof(precision, difference, len(expected), sum(map(len, expected)))
        if difference > self._tolerance(kept, expected, difference):
            if self._is_too_large(kept, expected):
                self._copies.scale = 1
                return self._failure(kept)
            return Failure(f"cannot be cut: outputs change by {difference:.1e}")
        return None

    def _error(self, kept: Kept) -> Failure | None:
        """Return with what error the network fails without these groups; ``None`` if it runs."""
        if self._deadline is not None:
            self._deadline.check()
        counter = OpCounter()
        try:
            self._counted(self._copies.cut(kept), counter)
        except Exception as error:  # as in _failure
            return self._error(kept) if self._uses_single_precision(kept) else Failure.of(error, counter.count)
        return None

    def _both(self, kept: Kept, counter: OpCounter) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Return the outputs of the masked copy and of the cut one, whose ops are counted."""
        if self._copies.cheap:  # the cut copy runs first, since most failing cuts raise an error
            found = self._counted(self._copies.cut(kept), counter)
            return self._outputs(self._copies.with_zeros(kept)), found
        model = self._copies.with_zeros(kept)
        expected = self._outputs(copy_sharing_weights(model, self._written))
        return expected, self._counted(self._copies.cut_(model, kept), counter)

    def _counted(self, model: nn.Module, counter: OpCounter) -> list[list[Tensor]]:
        """Return the outputs of a copy, whose ops are counted."""
        with counter:
            return self._outputs(model)

    def _uses_single_precision(self, kept: Kept) -> bool:
        """Change to single precision if the masked copy does not run in double precision; return whether so."""
        if self._copies.dtype is not torch.float64 or self._double_runs:
            return False
        try:
            outputs = self._outputs(self._copies.with_zeros(kept))
            self._double_runs = not largest_difference(outputs, outputs)  # not nan
        except Exception:  # a user's forward may raise anything where its code fixes a type
            return self._falls_back()
        return False

    def _falls_back(self) -> bool:
        """Change to single precision if double precision has given no numbers so far; return whether so."""
        if self._copies.dtype is not torch.float64 or self._double_runs:
            return False
        self._copies.dtype = torch.float32
        self._passes, self._copies.cast = self._narrow
        return True

    def _tolerance(self, kept: Kept, expected: Sequence[list[Tensor]], difference: float) -> float:
        """Return the largest difference that rounding errors may make."""
        exact = EXACT[self._copies.dtype]
        if difference <= exact or difference > LARGEST[torch.float32]:
            return exact  # measuring would change nothing
        groups = [group for group, _ in kept]
        return measured_tolerance(
            partial(self._copies.with_zeros, kept), groups, self._outputs, expected, self._copies.dtype
        )

    def _is_too_large(self, kept: Kept, expected: Sequence[list[Tensor]]) -> bool:
        """Return whether the factor of the weights makes outputs depend on rounding errors."""
        if self._copies.scale == 1 or self._steady:
            return False
        model = self._copies.with_zeros(kept)
        self._steady = not amplifies_rounding(model, self._outputs, expected, self._copies.dtype)
        return not self._steady

    def _twice(self, each: TrialPass) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs of a pass on two copies.

        Raises:
            NotFollowedError: If the pass fails.
        """
        try:
            return each.outputs(self._copies.whole()), each.outputs(self._copies.whole())
        except Exception as error:  # a user's forward may raise anything
            raise NotFollowedError(
                f"{type(self._model).__name__} cannot run on the example: {error!r}"
            ) from error

    def _checked(self, each: TrialPass) -> TrialPass:
        """Return a pass, not to be compared if it has no outputs, or other ones each time."""
        first, again = self._twice(each)
        same = bool(first) and relative_difference(first, again) <= LARGEST[torch.float32]
        return replace(each, compared=same)

    def _variant(self, each: TrialPass) -> Probe | None:
        """Return a pass on other inputs, in training mode if it does the same there; ``None`` if none runs.

        One that is known already is taken if it gives numbers with the weights that the model has now.
        """
        if each.probe.training:
            return None

        def runs(probe: Probe) -> bool:
            try:
                outputs = each.on(probe).outputs(self._copies.whole())
            except Exception:  # a user's forward may raise anything on inputs of another size
                return False
            return relative_difference(outputs, outputs) == 0  # not nan

        if each.variant is not None and runs(each.variant):
            return each.variant
        if not each.runs_in_training:
            return variant_that_runs(each.probe, runs)
        training = each.probe.in_training_mode()
        return variant_that_runs(training, runs) or training

    def _outputs(self, model: nn.Module) -> list[list[Tensor]]:
        """Return the outputs of each pass that are to be compared; the model's state may change.

        Each pass but the last runs on a copy, so that none sees the state that another one leaves.
        """
        *others, last = self._passes
        outputs = [each.outputs(copy_sharing_weights(model, self._written)) for each in others]
        outputs.append(last.outputs(model))
        return [found for found, each in zip(outputs, self._passes, strict=True) if each.compared]


def _failing(kept: Kept, passed: Kept, judge: _Judge) -> dict[str, Failure]:
    """Return the groups that fail, name to failure; all others pass together.

    Args:
        kept: The groups to test.
        passed: Groups that have passed, which are cut as well.
        judge: Says why groups cannot be cut together.
    """
    failing: dict[str, Failure] = {}
    passing, left = list(passed), list(kept)
    step = len(left)
    while left and (failure := judge([*passing, *left])) is not None:
        first, end = 0, len(left)  # left[:first] passes, left[:end] fails
        while end - first > 1:
            middle = first + min(step, (end - first) // 2)
            found = judge([*passing, *left[:middle]])
            if found is None:
                first, step = middle, 2 * step
            else:
                end, failure = middle, found
        failing[left[first][0].name] = failure
        passing, left = [*passing, *left[:first]], left[end:]
        step = 1  # where one has failed the next ones often do
    return failing
