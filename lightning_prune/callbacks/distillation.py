"""Distillation: Lightning's hooks, the teacher of the pruned network, and the callback's state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_prune.callbacks.pruning import pruning_callbacks
from lightning_prune.core import schema
from lightning_prune.core.files import read_file
from lightning_prune.core.model_copies import copy_model
from lightning_prune.core.same_kind import same_kind_as
from lightning_prune.core.tensors import tensors_by_name
from lightning_prune.export.compacted import load_compact
from lightning_prune.training.distillation_terms import DistillationTerm
from lightning_prune.training.lightning_packages import (
    Callback,
    LightningModule,
    Trainer,
    TrainerFn,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_prune.training.sandbox import modules_called
from lightning_prune.training.snapshots import WEIGHTS, restore_weights_, weights_of
from lightning_prune.training.stub_trainer import Position, use_stubs_
from lightning_prune.training.taught_steps import TaughtSteps
from lightning_prune.training.trainer_queries import WarnOnce, check_copied

STATE_VERSION = 1
_WHAT = "the checkpoint's distillation state"
_STATE = schema.record(
    {
        "version": schema.integer(STATE_VERSION),
        "module": schema.string,
        "weights": schema.optional(WEIGHTS),
    }
)


class Distillation(Callback):
    """Trains a network to give the outputs of a dense teacher, too.

    The loss is that of ``training_step`` plus ``weight`` times, with ``loss="kl"``,

        temperature**2 * mean over examples of KL(softmax(teacher / temperature) || softmax(own / temperature))

    (Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015), or with ``loss="mse"`` the
    mean squared difference. Examples are all positions but the dimension of the classes, as in the mean of
    ``cross_entropy``, also those that are padding. ``training_step`` stays as it is, and returns and logs its
    own loss. The term's gradient is added where the backward pass comes to the output: like the loss, it is
    multiplied by the loss scale and divided by the number of accumulated batches. Each call of the module in a
    step adds a term. Under manual optimization a term goes with the first backward pass through an output, and
    is not divided. The sum of a batch's terms, without ``weight``, is logged as ``distill/loss``.

    It works beside :class:`PruningCallback`, before or after it, and alone. The teacher is in evaluation mode
    and not trained. Each fit takes a new one; a fit that is resumed goes on with its own: with ``teacher=None``
    its weights are in the checkpoint, as the state of this callback. A Trainer takes one ``Distillation``.

    Args:
        teacher: ``None`` for the network as it is when training begins; the path of a checkpoint of the same
            LightningModule class, dense, masked or compacted, read with ``weights_only=True``; or a network,
            a copy of which is called with the arguments of the module that is compared.
        weight: Factor of the term, > 0.
        temperature: Temperature of both softmaxes, > 0; ``loss="mse"`` does not use it.
        loss: ``"kl"`` if outputs are logits of classes, ``"mse"`` for others, such as those of a regression.
        module: Name of the module whose output is compared, as in ``named_modules()``; ``""`` is the
            LightningModule itself. By default that one if ``training_step`` calls it, otherwise the only module
            with parameters that ``training_step`` itself calls, tried on a copy with the first batch. Its
            output is a tensor, has one named ``logits``, or holds one floating-point tensor.
        dim: Dimension of the classes; by default the second one of outputs of two dimensions.

    Raises:
        ValueError: If an argument is wrong or does not fit the module; before the first optimizer step.
    """

    def __init__(
        self,
        teacher: str | Path | nn.Module | None = None,
        *,
        weight: float = 1.0,
        temperature: float = 2.0,
        loss: Literal["kl", "mse"] = "kl",
        module: str | None = None,
        dim: int | None = None,
    ) -> None:
        self.teacher = teacher
        self.weight = weight
        self.temperature = temperature
        self.loss = loss
        self.module = module
        self.dim = dim
        self._term()
        self._saved: dict[str, Any] | None = None  # as loaded, or of the last fit
        self._resumes = False  # whether the next fit goes on with the saved teacher
        self._stage: str | None = None  # of the present run
        self._before_load: nn.Module | None = None  # a copy with its dense shapes
        self._teacher: nn.Module | None = (
            None  # of the present fit: all of it until it is known what is compared
        )
        self._steps: TaughtSteps | None = None
        self._warn = WarnOnce()

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the present run, whose Trainer holds what cannot be copied."""
        run = dict.fromkeys(("_stage", "_before_load", "_teacher", "_steps"))
        return vars(self) | run | {"_saved": self.state_dict() or None}

    def _term(self) -> DistillationTerm:
        """Return the term that the arguments describe.

        Raises:
            ValueError: If an argument is wrong.
        """
        if not (self.teacher is None or isinstance(self.teacher, str | Path | nn.Module)):
            raise ValueError(
                f"teacher={self.teacher!r} must be None, the path of a checkpoint, or a network (nn.Module)."
            )
        if not (self.module is None or isinstance(self.module, str)):
            raise ValueError(f"module={self.module!r} must be the name of a module, or None.")
        return DistillationTerm(self.loss, self.weight, self.temperature, self.dim)

    # --- a run begins and ends

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a run: check the arguments as they are now."""
        self._stage = stage
        if stage != TrainerFn.FITTING:
            return
        self._term()
        check_copied(trainer.strategy, "Distillation")
        if not self._resumes:
            self._saved = None
        if pruning_callbacks(trainer) and not isinstance(self.teacher, nn.Module):
            self._before_load = copy_model(pl_module)  # a checkpoint may make the module smaller
        self._warn.clear()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the network, which nothing has pruned yet in this fit, or load the teacher."""
        saved = self._saved if self._resumes else None
        self._resumes = False
        name = self._known_name(pl_module, saved)
        self._teacher = self._new_teacher(trainer, pl_module, saved)
        self._before_load = None
        if name is not None:
            self._begin(trainer, pl_module, name)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove all hooks, before the network is compacted."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove all hooks after an error or Ctrl-C."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove all hooks, however the run ended."""
        self._release()
        self._stage = None

    def _release(self) -> None:
        if self._steps is not None:
            self._saved = self._state(self._steps.name, on_cpu=True)
            self._steps.release()
        self._steps = self._teacher = self._before_load = None

    # --- training steps

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Find out what is compared before the first batch, unless an argument or a loaded state says it."""
        if self._steps is None:
            self._begin(trainer, pl_module, _called_in_step(trainer, pl_module, batch))
        assert self._steps is not None
        self._steps.begin_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the term."""
        steps = self._steps
        assert steps is not None
        if steps.value is not None:
            pl_module.log("distill/loss", steps.value, on_step=True, on_epoch=False, batch_size=1)
        gave_loss = outputs or not pl_module.automatic_optimization
        if gave_loss and (warning := steps.unreached()) is not None:
            self._warn(trainer, warning)

    def _begin(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        assert self._teacher is not None
        if not isinstance(self.teacher, nn.Module):
            self._teacher = self._teacher.get_submodule(name)
        self._steps = TaughtSteps(trainer, module, name, self._teacher, self._term())

    # --- the teacher

    def _known_name(self, module: LightningModule, saved: Mapping[str, Any] | None) -> str | None:
        """Return the name of the module that is compared, if an argument or a saved state says it."""
        then = None if saved is None else str(saved["module"])
        name = then if self.module is None else self.module
        names = [each for each, _ in module.named_modules()]
        if name is not None and name not in names:
            raise ValueError(
                f"module={name!r} must be the name of a module of {type(module).__name__}:"
                f" {', '.join(map(repr, names))}."
            )
        if then is not None and then != name:
            raise ValueError(
                f"module={name!r}: the checkpoint has a teacher of module={then!r}. Give that one, or resume"
                " without the callback's state."
            )
        return name

    def _new_teacher(
        self, trainer: Trainer, module: LightningModule, saved: Mapping[str, Any] | None
    ) -> nn.Module:
        """Return the teacher on the device of a module and in the precision of the fit."""
        weights = None if saved is None else saved["weights"]
        if isinstance(self.teacher, nn.Module):
            teacher = copy_model(self.teacher)
        elif self.teacher is not None:
            teacher = self._dense_copy(module)
            try:
                load_compact(read_file(self.teacher, "teacher"), teacher)
            except ValueError as error:
                raise ValueError(f"teacher={str(self.teacher)!r}: {error}") from error
        elif weights is not None:
            assert saved is not None
            teacher = self._dense_copy(module)
            _load(teacher.get_submodule(saved["module"]), weights)
        else:
            teacher = copy_model(module)
            if trainer.ckpt_path is not None:
                rank_zero_warn(
                    "The checkpoint holds no teacher for Distillation: the network as it was loaded is the"
                    " teacher. Give teacher=... if it was pruned before."
                )
        if self.teacher is not None and weights is not None:
            rank_zero_info("Distillation: the teacher is that of the argument, not the one in the checkpoint.")
        use_stubs_(teacher, trainer, Position(trainer.current_epoch, trainer.global_step))
        return trainer.precision_plugin.convert_module(teacher).to(module.device)

    def _dense_copy(self, module: LightningModule) -> nn.Module:
        """Return a copy of a module with the shapes that it had before a checkpoint was loaded into it."""
        before, now = self._before_load, tensors_by_name(module)
        if before is None or tensors_by_name(before).keys() != now.keys():  # the module was built since
            return copy_model(module)
        cut = any(each.shape != now[name].shape for name, each in tensors_by_name(before).items())
        return before if cut else copy_model(module)

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """Return what is compared and, with ``teacher=None``, the teacher: tensors and plain values only."""
        return (self._saved or {}) if self._steps is None else self._state(self._steps.name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved teacher for the fit that is about to begin.

        Raises:
            ValueError: If it is not a state of this callback, or a later version of lightning_prune wrote it.
        """
        state = schema.read_versioned(state_dict, _STATE, STATE_VERSION, _WHAT)
        if self._stage in (None, TrainerFn.FITTING) and self._steps is None:
            self._saved, self._resumes = state, True

    def _state(self, name: str, *, on_cpu: bool = False) -> dict[str, Any]:
        weights: dict[str, Tensor] | None = None
        if self.teacher is None and self._teacher is not None:
            weights = weights_of(self._teacher) if on_cpu else tensors_by_name(self._teacher)
        return {"version": STATE_VERSION, "module": name, "weights": weights}


def _called_in_step(trainer: Trainer, module: LightningModule, batch: Any) -> str:
    """Return the name of the module with parameters that ``training_step`` calls, tried on a copy.

    Raises:
        ValueError: If it calls none, or several without the LightningModule itself.
    """
    found, failure = modules_called(trainer, module, batch)
    if "" in found:
        return ""
    if len(found) == 1:
        return found[0]
    called = f"calls {', '.join(map(repr, found))}" if found else "calls none"
    failed = "" if failure is None else f", and fails outside the loop with {failure!r}"
    raise ValueError(
        f"module=None: training_step of {type(module).__name__} does not call the module itself, which would be"
        f" compared. Of those with parameters it {called}{failed}. Give the one whose output is compared, which"
        " must be called with the batch: module='NAME'."
    )


def _load(part: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load saved weights into a module, all of them or none.

    Raises:
        ValueError: If they are not those of such a module.
    """
    present = tensors_by_name(part)
    if present.keys() != weights.keys():
        other = sorted(present.keys() ^ weights.keys())[0]
        raise ValueError(f"{_WHAT}: only one of its teacher and this {type(part).__name__} has {other!r}.")
    schema.read(weights, same_kind_as(present), f"{_WHAT}: the teacher")
    restore_weights_(part, weights)
