"""Trains and prunes a small image classifier: `python recipes/cifar.py fit --config recipes/digits.yaml`."""

from __future__ import annotations

from classifier import Classifier
from data import Images

from lightning_prune.cli import PruningCLI


def main() -> None:
    """Run the command line."""
    PruningCLI(Classifier, Images, subclass_mode_data=True)


if __name__ == "__main__":
    main()
