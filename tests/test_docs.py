"""What the documents show runs, and is as short as they say."""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lit import Lit, digits, seeded
from networks_by_coupling import NETS
from networks_by_op import CASES, ROWS_OF_NETS
from torch import nn

import lightning_prune
from lightning_prune import Channels, Criterion, Cubic, PerLayer, Pruner, compact

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_prune"


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_criteria_in_the_guide_work_and_are_short() -> None:
    space: dict[str, object] = {}
    for block in blocks("docs/criterion.md"):
        exec(block, space)
        for body in re.findall(r"^class .*?(?=\n\n\n|\Z)", block, re.DOTALL | re.MULTILINE):
            assert len([line for line in body.splitlines() if line.strip()]) < 15
    for name in ("Persistence", "Smallest"):
        criterion = space[name]()
        assert isinstance(criterion, Criterion)
        model = nn.Linear(4, 4)
        pruner = Pruner(model, 0.5, criterion=criterion, schedule=None)
        model(torch.ones(1, 4)).sum().backward()
        pruner.observe()
        pruner.prune(1.0)
        assert int((model.weight == 0).sum()) == 8
    prune_by_brute_force, model = space["prune_by_brute_force"], nn.Linear(4, 4)
    prune_by_brute_force(model, [(torch.ones(2, 4), torch.tensor([0, 1]))])
    assert int((model.weight == 0).sum()) == 8


def test_the_guide_to_channels_gives_a_smaller_network() -> None:
    space: dict[str, object] = {}
    exec(blocks("docs/channels.md")[0], space)
    model, smaller = space["model"], space["smaller"]
    assert isinstance(model, nn.Module)
    assert isinstance(smaller, nn.Module)
    assert sum(each.numel() for each in smaller.parameters()) < sum(each.numel() for each in model.parameters())


def test_channels_go_through_the_ops_in_the_guide() -> None:
    space: dict[str, Any] = {"torch": torch}
    exec(blocks("docs/channels.md")[1], space)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
            self.scale = nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scaled = space["scaled_tanh"](self.one(x), self.scale)
            result: torch.Tensor = self.three(
                space["take_rows"](self.two(scaled).relu(), torch.tensor([1, 0, 1]))
            )
            return result

    model, rows = Own(), torch.randn(4, 6)
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=rows)
    pruner.prune(1.0)
    smaller = compact(model, pruner.masks, rows)
    assert [(group.name, group.size) for group in pruner.groups] == [("one", 8), ("two", 7)]
    assert len(smaller.scale) == 4
    torch.testing.assert_close(
        smaller.double()(rows.double()), model.double()(rows.double()), rtol=1e-12, atol=0
    )


def test_the_guide_to_experts_gives_a_smaller_mixture() -> None:
    space: dict[str, Any] = {}
    exec(blocks("docs/channels.md")[2], space)
    mixture, smaller, tokens = (space[name] for name in ("mixture", "smaller", "tokens"))
    torch.testing.assert_close(smaller(tokens), mixture(tokens))
    assert sum(each.numel() for each in smaller.experts.parameters()) == 2 * (8 * 8 + 8)


def test_the_guide_to_rounds_prunes_over_several_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Lit, "train_dataloader", lambda self: digits(examples=128), raising=False)
    monkeypatch.setattr(Lit, "val_dataloader", lambda self: digits(examples=64), raising=False)
    rounds, plan = blocks("docs/rounds.md")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    space: dict[str, Any] = {"model": seeded(Lit), "example": next(iter(digits()))[0]}
    exec(rounds, space)
    assert [each.good for each in space["result"].rounds] == [True] * 2
    smaller, model = (sum(each.numel() for each in space[name].parameters()) for name in ("smaller", "model"))
    assert smaller < model
    space |= {"Cubic": Cubic, "Trainer": partial(space["Trainer"], **quiet)}
    exec(plan.replace('"10ep"', '"10ep", measure_seconds=0'), space)
    events = [each for each in space["pruning"].report.history if each.sparsity and each.metric is None]
    assert [each.step for each in events] == [2 * epoch for epoch in range(2, 8)]


def test_the_guide_has_a_row_for_each_kind_of_op() -> None:
    table = re.findall(r"^\| (?!op |---)(.*?) \|", (ROOT / "docs/channels.md").read_text(), re.MULTILINE)
    assert table == list(dict.fromkeys([*ROWS_OF_NETS, *(case.row for case in CASES)]))
    named = [name for names in ROWS_OF_NETS.values() for name in names.split()]
    assert sorted(named) == sorted(make.__name__ for make, *_ in NETS)


def test_the_readme_names_every_part() -> None:
    text = (ROOT / "README.md").read_text()
    bases = {"Criterion", "LocalCriterion", "Report", "Schedule", "Selector", "Structure", "measure"}
    assert [name for name in lightning_prune.__all__ if name not in text and name not in bases] == []


def architecture() -> str:
    return (ROOT / "docs/architecture.md").read_text()


def test_the_architecture_page_names_every_folder_in_the_order_of_imports() -> None:
    rows = re.findall(r"^\| `([\w.]+)/?` \|", architecture(), re.MULTILINE)
    top = {
        path.stem for path in PACKAGE.iterdir() if path.name not in ("__init__.py", "__pycache__", "py.typed")
    }
    assert {row.removesuffix(".py") for row in rows} == top
    assert len(list(PACKAGE.glob("*.*"))) <= 5
    assert len([path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]) <= 12
    settings = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^layers = \[(.*?)\]", settings, re.DOTALL | re.MULTILINE)
    layers = re.findall(r'"(.+)"', listed)
    level = {name: place for place, layer in enumerate(layers) for name in layer.split(" | ")}
    places = [level[row.removesuffix(".py")] for row in rows]
    assert places == sorted(places)
    assert len(layers) <= 12


def test_the_readme_says_what_each_folder_is_for() -> None:
    inside = (ROOT / "README.md").read_text().partition("## Inside")[2]
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"`(\w+)`", inside)) == folders


def test_every_path_on_the_architecture_page_exists() -> None:
    paths = set(re.findall(r"[\w/]+\.py\b", architecture()))
    assert len(paths) > 40
    for path in paths:
        found = [PACKAGE / path] if "/" in path else list(PACKAGE.rglob(path))
        assert any(each.exists() for each in found), path
    for path, cls, method in re.findall(r"([\w/]+\.py) +([A-Z]\w+)(?:\.(\w+))?", architecture()):
        source = (PACKAGE / path).read_text()
        assert f"class {cls}" in source, (path, cls)
        assert not method or f"def {method}(" in source, (path, method)


def test_tests_lie_in_folders_of_the_names_of_the_package() -> None:
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/**/*.py")}
    tests = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert tests == folders


def test_no_file_and_no_class_is_too_long() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert source.count("\n") <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                assert (node.end_lineno or 0) - node.lineno < 300, (path, node.name)


def test_every_guarantee_has_its_test() -> None:
    named = set(re.findall(r"\btest_\w+", (ROOT / "docs/guarantees.md").read_text()))
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 40
    assert named - set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE)) == set()
