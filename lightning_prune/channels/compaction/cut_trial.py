"""Trial cuts on copies of a model, which show for which unit groups a cut leaves the outputs the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_prune.channels.compaction.example_variants import variant_that_runs
from lightning_prune.channels.compaction.failures import described
from lightning_prune.channels.compaction.perturbation import perturb_, scale_
from lightning_prune.channels.compaction.plan import Kept, make_plan
from lightning_prune.channels.compaction.proof import Proof
from lightning_prune.channels.compaction.replay import replay_
from lightning_prune.channels.compaction.tolerance import EXACT, LARGEST, largest_difference, measured_tolerance
from lightning_prune.channels.compaction.trial_pass import TrialPass
from lightning_prune.core.averages import averaged_names
from lightning_prune.core.model_copies import copy_model, copy_sharing_weights
from lightning_prune.core.probes import Deadline, NotFollowedError, Probe, relative_difference
from lightning_prune.core.tensors import cast_model_

_SCALE = 3.0  # of the weights of trials in double precision


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
            the weights of the units at 0; refining changes it. ``None`` if those of the model itself are 0
            already where it is to be cut.
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
        self._model, self._perturbed, self._known, self._deadline = model, perturbed, known, deadline
        self._masked = perturbed is None
        self._scale = 1.0
        self._averages = averaged_names(model)
        self._written = frozenset[str]().union(*(each.written for each in passes))
        self._shared: nn.Module | None = None
        self.proof: Proof | None = None
        self._decided = any(each.decided for each in passes)
        self._dtype, self._cast = torch.float64 if self._decided else torch.float32, passes[0].cast
        self.passes = [each.to(self._dtype) for each in passes] if known and self._cast else list(passes)
        self._first, *self._others = self.passes
        if not known:
            self._begin()
        self._double_runs = self._dtype is torch.float64

    def _begin(self) -> None:
        """Choose the precision of the first trials, and check that the model can be tried in it.

        Raises:
            ValueError: As for the constructor.
        """
        given = self.passes
        types = [(torch.float64, True)] * self._decided + [(torch.float32, True), (torch.float32, False)]
        for self._dtype, self._cast in types:  # without a cast they are those that the model's code fixes
            try:
                cast = [each.to(self._dtype) for each in given] if self._cast else given
                first, again = self._first_outputs(cast)
                break
            except NotFollowedError:
                if not self._cast:
                    raise
        if not first:
            raise NotFollowedError(
                f"{type(self._model).__name__} gives no tensor to compare: let forward return its outputs."
            )
        if relative_difference(first, first):
            changed = "" if self._masked else ", or does when its weights change a little, as in trials of cuts"
            raise NotFollowedError(
                f"the model gives nan for the example{changed}: nothing can be compared with nan."
            )
        if relative_difference(first, again) > LARGEST[torch.float32]:
            raise NotFollowedError(
                "the model gives different outputs for one example: no cut can be tried on it."
            )

    def _first_outputs(self, passes: Sequence[TrialPass]) -> tuple[list[Tensor], list[Tensor]]:
        """Take the passes in the precision of the first trials; return the outputs of the first one, twice.

        First trials are many: their copies share the memory of one, except changed weights.

        Raises:
            NotFollowedError: If the first pass fails or, in double precision, any.
        """
        self._shared, self._shared_type = None, self._dtype
        self._shared = self._whole_copy() if self._perturbed is None else copy_sharing_weights(self._perturbed)
        if self._cast:
            cast_model_(self._shared, self._dtype)
        self.passes = [replace(each, cast=self._cast) for each in passes]
        self._first, *self._others = self.passes
        self._passes = [self._first]
        if self._dtype is torch.float64:  # other precisions are tried later, where a pass does not run in it
            for each in self._others:
                self._twice(each)
        return self._twice(self._first)

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
            self.passes = [self._first, *map(self._checked, self._others)]
        self.passes = [replace(each, variant=self._variant(each)) for each in self.passes]
        variants = [each.on(each.variant) for each in self.passes if each.variant is not None]
        if self._masked:
            passes = [*(each.on(each.example) for each in self.passes), *variants]
        else:  # first trials ran on the example, or a smaller one, and the model is cut by passes on it
            passes = [each.on(each.variant or each.probe) for each in self.passes]
        self._narrow = passes, self._cast
        self._passes = [each.to(torch.float64) for each in self._narrow[0]]
        self._dtype, self._cast = torch.float64, True
        if self._masked:
            self._shared = None  # copies are of the model's own weights
        else:  # other weights, where it happens that those of the first trials hide something
            assert self._shared is not None
            perturb_(self._shared, seed=1)
            self._scale = _SCALE

    def can_cut(self, kept: Kept) -> bool:
        """Return whether these groups can be cut together."""
        return self._failure(kept) is None

    def failing(self, kept: Kept, passed: Kept = ()) -> dict[str, str]:
        """Return the groups that cannot be cut, name to reason; all others can be cut together.

        All groups are cut at once. If that fails, the first half is tried, then the second half together with
        the groups of the first that passed, and so on by bisection. A group that fails before :meth:`refine`
        cannot be cut; one that passes may still fail afterwards.

        Args:
            kept: The groups to test, each with a bool mask over its units, False for a unit to cut.
            passed: Groups that have passed, in the same form, which are cut as well.

        Raises:
            ValueError: If the deadline has passed.
        """
        if not kept:
            return {}
        reason = self._failure([*passed, *kept])
        if reason is None:
            return {}
        if len(kept) == 1:
            return {kept[0][0].name: reason}
        middle = len(kept) // 2
        failing = self.failing(kept[:middle], passed)
        passing = [each for each in kept[:middle] if each[0].name not in failing]
        return failing | self.failing(kept[middle:], [*passed, *passing])

    def _failure(self, kept: Kept) -> str | None:
        """Return why these groups cannot be cut together; ``None`` if they can."""
        if self._deadline is not None:
            self._deadline.check()
        try:  # the cut copy runs first, since most failing cuts raise an error
            found = self._outputs(self._cut_copy(kept))
            expected = self._outputs(self._masked_copy(kept))
        except Exception as error:  # a user's forward may raise anything when shapes do not fit
            if self._uses_single_precision(kept):
                return self._failure(kept)
            return f"cannot be cut: {described(error)}"
        self._double_runs |= self._dtype is torch.float64
        if largest_difference(expected, expected):  # nan
            if self._scale == 1:
                return "cannot be compared: the network gives nan"
            self._scale = 1
            return self._failure(kept)
        difference = largest_difference(expected, found)
        precision = str(self._dtype).removeprefix("torch.") if self._cast else "the types of the model"
        self.proof = Proof(precision, difference, len(expected), sum(map(len, expected)))
        if difference > self._tolerance(kept, expected, difference):
            return f"cannot be cut: outputs change by {difference:.1e}"
        return None

    def _uses_single_precision(self, kept: Kept) -> bool:
        """Change to single precision if the masked copy does not run in double precision; return whether so."""
        if self._dtype is not torch.float64 or self._double_runs:
            return False
        try:
            self._outputs(self._masked_copy(kept))
            self._double_runs = True
        except Exception:  # a user's forward may raise anything where its code fixes a type
            self._dtype = torch.float32
            self._passes, self._cast = self._narrow
            return True
        return False

    def _tolerance(self, kept: Kept, expected: Sequence[list[Tensor]], difference: float) -> float:
        """Return the largest difference that rounding errors may make."""
        exact = EXACT[self._dtype]
        if difference <= exact or difference > LARGEST[torch.float32]:
            return exact  # measuring would change nothing
        groups = [group for group, _ in kept]
        return measured_tolerance(
            partial(self._masked_copy, kept), groups, self._outputs, expected, self._dtype
        )

    def _twice(self, each: TrialPass) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs of a pass on two copies.

        Raises:
            NotFollowedError: If the pass fails.
        """
        try:
            return each.outputs(self._copy()), each.outputs(self._copy())
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
                outputs = each.on(probe).outputs(self._copy())
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

    def _whole_copy(self) -> nn.Module:
        model = copy_model(self._model)
        if self._cast:
            cast_model_(model, self._dtype)
        return model

    def _copy(self, own: Iterable[str] = ()) -> nn.Module:
        """Return a copy of the model in the precision of the trials.

        Args:
            own: Names of parameters that the caller changes in place. Others may share their memory with the
                copies of other trials: only their ``data`` attribute may be set.
        """
        if self._shared is None:
            return self._whole_copy()
        if self._dtype is self._shared_type and self._scale == 1:
            return copy_sharing_weights(self._shared, {*own, *self._written})
        # those that are cast get memory of their own then
        parameters = self._shared.named_parameters()
        kept = {name for name, each in parameters if each.dtype is self._dtype or not each.is_floating_point()}
        model = copy_sharing_weights(self._shared, kept) if self._cast else copy_model(self._shared)
        if self._cast:
            cast_model_(model, self._dtype)
        scale_(model, self._scale)
        return model

    def _cut_copy(self, kept: Kept) -> nn.Module:
        model = self._copy()
        # the plan of the model itself: averages are known by their values, which trials perturb
        replay_(model, make_plan(self._model, kept))
        return model

    @torch.no_grad()
    def _masked_copy(self, kept: Kept) -> nn.Module:
        factors: dict[str, list[Tensor]] = {}
        for group, units in () if self._masked else kept:
            for part in group.masked:
                # in the weight's dtype, since any other would be converted after it is expanded to full size
                weight = self._model.get_parameter(part.name)
                factor = part.spread(units.to(weight.device, self._dtype))
                factors.setdefault(part.name, []).append(factor)
        factors |= {own: factors[name] for own, name in self._averages.items() if name in factors}
        model = self._copy(factors)
        for name, each in factors.items():
            for factor in each:
                model.get_parameter(name).mul_(factor)
        return model
