"""The two packages that Lightning comes in: ``lightning.pytorch`` and ``pytorch_lightning``.

Each has classes of its own, and takes no others for its own. Where both are installed, the callback classes
from here derive from those of both, and checks take either. No other module imports Lightning.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeGuard

from lightning_utilities.core import rank_zero
from lightning_utilities.core.overrides import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.strategies import Strategy
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities import CombinedLoader
    from lightning.pytorch.utilities.seed import isolate_rng
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

_OLDEST = (2, 5)  # version

__all__ = [
    "PACKAGES",
    "Callback",
    "CombinedLoader",
    "EarlyStopping",
    "LightningArgumentParser",
    "LightningCLI",
    "LightningDataModule",
    "LightningModule",
    "ModelCheckpoint",
    "Strategy",
    "Trainer",
    "TrainerFn",
    "classes",
    "is_lightning_module",
    "is_param_in_hook_signature",
    "isolate_rng",
    "overrides",
    "package_of",
    "rank_zero_info",
    "rank_zero_warn",
]


def _import_packages() -> tuple[str, ...]:
    """Import the packages that are installed and work, and return their names.

    Each sets the logger of all messages when it is imported: the one that a user has imported before keeps it.
    """
    names = ("lightning.pytorch", "pytorch_lightning")
    logger = rank_zero.log if any(name in sys.modules for name in names) else None
    found: list[str] = []
    problems: list[str] = []
    for name in names:
        if find_spec(name.partition(".")[0]) is None:
            continue
        try:
            version = import_module(name).__version__
            if tuple(map(int, version.split(".")[:2])) < _OLDEST:
                raise ImportError(f"{name} {version} is older than {'.'.join(map(str, _OLDEST))}")
            found.append(name)
        except Exception as error:
            problems.append(f"{name} cannot be used: {error!r}")
    if not found:
        raise ImportError("lightning_prune needs Lightning: pip install lightning. " + "; ".join(problems))
    if logger is not None:
        rank_zero.log = logger
    for problem in problems:
        rank_zero_warn(problem)
    return tuple(found)


PACKAGES = _import_packages()


def classes(place: str, name: str) -> tuple[Any, ...]:
    """Return the class, or function, of each installed package.

    Args:
        place: Name of the module within the package, such as ``"callbacks"``.
        name: Name of the class.
    """
    return tuple(getattr(import_module(f"{package}.{place}"), name) for package in PACKAGES)


class _Initialised:
    """Ends the chain of constructors after that of one package: it has set all attributes."""

    def __init__(self) -> None:
        pass


def _of_all(name: str) -> type:
    first, *others = classes("callbacks", name)
    # LightningCLI takes each subclass of a callback by its short name, unless it is private: with the name of
    # Lightning's own class, neither could be named any more
    return type(f"_{name}", (first, _Initialised, *others), {"__doc__": f"{name} of all installed packages."})


_OWNERS = classes("core", "LightningModule") + classes("core", "LightningDataModule")

if not TYPE_CHECKING:
    LightningModule, LightningDataModule = _OWNERS[0], _OWNERS[len(PACKAGES)]
    Trainer = classes("trainer", "Trainer")[0]
    Callback, EarlyStopping, ModelCheckpoint = map(_of_all, ("Callback", "EarlyStopping", "ModelCheckpoint"))
    Strategy = classes("strategies", "Strategy")[0]
    TrainerFn = classes("trainer.states", "TrainerFn")[0]
    CombinedLoader = classes("utilities", "CombinedLoader")[0]
    isolate_rng = classes("utilities.seed", "isolate_rng")[0]
    is_param_in_hook_signature = classes("utilities.signature_utils", "is_param_in_hook_signature")[0]

    def __getattr__(name):  # these need more than Lightning's own requirements
        if name not in ("LightningArgumentParser", "LightningCLI"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return classes("cli", name)[0]


def is_lightning_module(module: object) -> TypeGuard[LightningModule]:
    """Return whether a module is a LightningModule of any package."""
    return isinstance(module, _OWNERS[: len(PACKAGES)])


def overrides(owner: object, name: str) -> bool:
    """Return whether a LightningModule or LightningDataModule has its own method of a name."""
    base = next(each for each in _OWNERS if isinstance(owner, each))
    return is_overridden(name, owner, base)


def package_of(kind: type) -> str | None:
    """Return the package that a class of modules or data modules derives from; ``None`` if it is none."""
    for place, package in enumerate(PACKAGES):
        if issubclass(kind, _OWNERS[place :: len(PACKAGES)]):
            return package
    return None
