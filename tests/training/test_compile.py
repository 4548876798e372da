"""Compiled modules: pruned like others, and never compiled again for it, but for the smaller network."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lit import Lit, digits, fit, same, seeded, trainer
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_prune import Channels, Cubic, Global, Gradient, NofM, PruningCallback, Taylor

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute:UserWarning"
    ),  # of the compiler's own looking around
    pytest.mark.filterwarnings("ignore:Using `torch.compile.*global hooks:UserWarning"),
]
SCHEDULE = Cubic("2st", "14st", every="2st")
PARTS: dict[str, Callable[[], PruningCallback]] = {
    "weights": lambda: PruningCallback(0.8, criterion=Taylor(), schedule=SCHEDULE),
    "channels": lambda: PruningCallback(
        0.4, criterion=Taylor(), structure=Channels(), selector=Global(budget="macs"), schedule=SCHEDULE
    ),
    "pattern": lambda: PruningCallback(criterion=Gradient(), selector=NofM(2, 4), schedule=SCHEDULE),
}


class Compiler:
    """A backend that counts how often it is given the network, not Lightning's ``log``."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: GraphModule, examples: list[Any]) -> Callable[..., Any]:
        self.graphs += any("conv" in str(node.target) for node in graph.graph.nodes)
        return graph.forward


class Inner(nn.Sequential):
    """torch 2.6 compiles no container of its own."""

    def forward(self, images: Tensor) -> Tensor:
        for layer in self:
            images = layer(images)
        return images


def compiled_net(compiler: Compiler) -> Lit:
    model = seeded(Lit)
    model.net = Inner(*model.net)
    model.net.compile(backend=compiler)
    return model


def compiled_module(compiler: Compiler) -> Lit:
    model = seeded(Lit)
    model.compile(backend=compiler)
    return model


def compiled_outside(compiler: Compiler) -> Any:
    return torch.compile(seeded(Lit), backend=compiler)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("make", [compiled_net, compiled_module, compiled_outside])
def test_a_compiled_module_gets_the_masks_of_the_plain_one_and_is_not_compiled_again(
    tmp_path: Path, make: Callable[[Compiler], Any], name: str
) -> None:
    def graphs(*callbacks: PruningCallback) -> int:
        torch._dynamo.reset()
        fit(tmp_path, make(compiler := Compiler()), *callbacks, limit_val_batches=0)
        return compiler.graphs

    fit(tmp_path, seeded(Lit), plain := PARTS[name](), limit_val_batches=0)
    found = graphs(pruning := PARTS[name]())
    assert len([entry for entry in pruning.report.history if entry.metric is None]) == 7
    assert same(dict(pruning.masks), dict(plain.masks))
    assert found == graphs() > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_copy_of_a_compiled_module_stays_alive(tmp_path: Path) -> None:
    class Own(Lit):
        pass

    torch._dynamo.reset()
    model = seeded(Own)
    model.compile(backend=Compiler())
    fit(tmp_path, model, pruning := PARTS["weights"](), limit_val_batches=0)
    assert pruning.report.macs is not None
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alive = [each for each in gc.get_objects() if type(each) is Own]
    assert len(alive) == 1


def test_a_smaller_network_is_compiled_once_more(tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiler = Compiler()
    model = compiled_net(compiler)
    pruning = PruningCallback(0.4, structure=Channels(), schedule=SCHEDULE, compact=True)
    fit(tmp_path, model, pruning, limit_val_batches=0)
    before = compiler.graphs
    trainer(tmp_path, max_epochs=2).fit(model, digits())
    assert compiler.graphs == before + 1
