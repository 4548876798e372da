"""What the documents show runs, and is as short as they say."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks_by_coupling import NETS
from networks_by_op import CASES, ROWS_OF_NETS
from torch import nn

import lightning_prune
from lightning_prune import Channels, Criterion, PerLayer, Pruner, compact
from lightning_prune.cli import PruningCLI
from lightning_prune.training.lightning_packages import LightningCLI

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_prune"
NOTEBOOKS = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))

# of what pages show, whichever test runs them first
pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:.*more than max_drop", "ignore:.*rows of calibration data"
)

START = "docs/index.md"  # whose first block is digits.py
SITE = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
Run = Callable[[str], dict[str, Any]]

_spaces: dict[str, dict[str, Any]] = {}  # page to the names that its blocks leave


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


PAGES = [name for path in SITE if blocks(name := path.relative_to(ROOT).as_posix())]


def digits() -> dict[str, Any]:
    """Returns what pages begin with: the names of digits.py, with few images, a model and data."""
    space: dict[str, Any] = {}
    exec(blocks(START)[0], space)

    class Few(space["Digits"]):  # type: ignore[misc]
        def __init__(self, batch_size: int = 64) -> None:
            super().__init__(batch_size)
            self.train, self.val = ([each[:64] for each in part] for part in (self.train, self.val))

    return space | {"Digits": Few, "model": space["Net"](), "data": Few()}


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs all blocks of a page, once, in an empty folder, and gives the names that they leave."""
    monkeypatch.chdir(tmp_path)
    for name in ("ENABLE_PROGRESS_BAR", "ENABLE_MODEL_SUMMARY", "LOGGER"):
        monkeypatch.setenv(f"PL_TRAINER_{name}", "False")

    def run(page: str) -> dict[str, Any]:
        if page not in _spaces:
            torch.manual_seed(0)
            space = digits()
            for block in blocks(page)[page == START :]:
                exec(compile(block, page, "exec"), space)
            _spaces[page] = space
        return _spaces[page]

    return run


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_runs(page: str, ran: Run) -> None:
    if "import optuna" in "".join(blocks(page)):
        pytest.importorskip("optuna")
    ran(page)


def test_the_criteria_in_the_guide_work_and_are_short(ran: Run) -> None:
    space = ran("docs/criterion.md")
    for block in blocks("docs/criterion.md"):
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


def test_the_guide_to_channels_gives_a_smaller_network(ran: Run) -> None:
    space = ran("docs/channels.md")
    model, smaller = space["model"], space["smaller"]
    assert isinstance(model, nn.Module)
    assert isinstance(smaller, nn.Module)
    assert sum(each.numel() for each in smaller.parameters()) < sum(each.numel() for each in model.parameters())


def test_channels_go_through_the_ops_in_the_guide(ran: Run) -> None:
    space = ran("docs/channels.md")

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


def test_the_guide_to_experts_gives_a_smaller_mixture(ran: Run) -> None:
    space = ran("docs/channels.md")
    mixture, smaller, tokens = (space[name] for name in ("mixture", "smaller", "tokens"))
    torch.testing.assert_close(smaller(tokens), mixture(tokens))
    assert sum(each.numel() for each in smaller.experts.parameters()) == 2 * (8 * 8 + 8)


def test_the_guide_to_rounds_prunes_over_several_fits(ran: Run) -> None:
    space = ran("docs/rounds.md")
    assert [each.target for each in space["result"].rounds][:1] == [0.3]
    events = [each for each in space["pruning"].report.history if each.sparsity and each.metric is None]
    assert [each.step for each in events] == list(range(2, 8))  # an epoch is one step


def test_the_guide_has_a_row_for_each_kind_of_op() -> None:
    table = re.findall(r"^\| (?!op |---)(.*?) \|", (ROOT / "docs/channels.md").read_text(), re.MULTILINE)
    assert table == list(dict.fromkeys([*ROWS_OF_NETS, *(case.row for case in CASES)]))
    named = [name for names in ROWS_OF_NETS.values() for name in names.split()]
    assert sorted(named) == sorted(make.__name__ for make, *_ in NETS)


def test_every_public_name_is_on_one_page_of_the_reference() -> None:
    shown = [
        name
        for path in SITE
        for name in re.findall(r"^::: lightning_prune\.(\w+)$", path.read_text(), re.MULTILINE)
    ]
    assert sorted(shown) == sorted(lightning_prune.__all__)


def test_the_methods_page_has_every_part() -> None:
    text = (ROOT / "docs/methods/index.md").read_text()
    cards = [path.read_text() for path in (ROOT / "docs/methods").glob("*.md")]
    parts = re.findall(r"^::: lightning_prune\.(\w+)$", "".join(cards), re.MULTILINE)
    assert len(parts) == 31
    assert [name for name in parts if f"`{name}" not in text] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_the_outputs_of_one_run(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.get("name", output["output_type"]) for cell in cells for output in cell["outputs"]}
    assert kinds <= {"stdout", "display_data"}  # no error, and nothing of a log


def prose(path: Path) -> str:
    """Returns the Markdown of a page or a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


# those of the other pages are checked where the site is built
@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *NOTEBOOKS], ids=lambda path: path.stem)
def test_links_lead_to_files_of_the_repository_and_their_headings(path: Path) -> None:
    links = re.findall(r"""(?:\]\(|src=")([^)"#:]+)(?:#([^)"]*))?[)"]""", prose(path))
    assert links or path.stem == "SECURITY"
    for target, heading in links:
        page = path.parent / target
        assert page.is_file(), target
        titles = re.findall(r"^#+ (.*)", prose(page), re.MULTILINE) if heading else [""]
        assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_versions_agree() -> None:
    found = {
        re.search(rf"^{key} (.+)$", (ROOT / name).read_text(), re.MULTILINE)[1].strip('"')  # type: ignore[index]
        for name, key in {"pyproject.toml": "version =", "CITATION.cff": "version:"}.items()
    }
    assert len(found) == 1
    changes = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert found <= set(changes)


def test_every_command_has_its_page() -> None:
    own = PruningCLI.subcommands().keys() - LightningCLI.subcommands().keys()
    assert {path.stem for path in (ROOT / "docs/commands").glob("*.md")} == {"index", "fit", *own}


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
def test_the_settings_of_the_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits.py").write_text(blocks(START)[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    settings = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/commands/index.md").read_text(), re.DOTALL)
    for number, text in enumerate(settings):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        PruningCLI(args=["plan", "--config", str(path)])
    assert "76,406 of 84,896 weights removed" in capsys.readouterr().out


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


@pytest.mark.parametrize("page", ["guarantees", "compared"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = set(re.findall(r"\btest_\w+", (ROOT / f"docs/{page}.md").read_text()))
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 20
    assert named - set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE)) == set()


# column of the comparison to a package, and the folders that hold what is compared
OTHERS = {
    "Torch-Pruning": ("torch_pruning", [""]),
    "fasterai": ("fasterai", [""]),
    "ModelOpt": (
        "modelopt",
        ["torch/prune", "torch/puzzletron", "torch/sparsity/weight_sparsity", "torch/nas"],
    ),
    "ModelPruning": ("lightning", ["pytorch/callbacks/pruning.py"]),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_comparison_is_what_the_code_of_the_others_shows(other: str) -> None:
    package, folders = OTHERS[other]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs {package}")
    root = Path(spec.submodule_search_locations[0])
    compared = "".join(
        path.read_text(errors="ignore").lower()
        for folder in folders
        for path in ([root / folder] if folder.endswith(".py") else (root / folder).rglob("*.py"))
    )
    claims, shown = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        for table in re.findall(r"(?:^\|.*\n)+", (ROOT / "docs/compared.md").read_text(), re.MULTILINE)
    )
    assert [row[0] for row in claims] == [row[0] for row in shown]
    column = claims[0].index(other)
    for name, *cells in shown[2:]:
        found = re.findall(r"(without )?(?:`([\w/]+\.py)` )?`([^`]+)`", cells[column - 1])
        assert found, name
        for without, file, words in found:
            if without:
                assert words not in compared, (name, words)
            else:
                texts = [path.read_text() for path in root.rglob(file)]
                assert any(words in text for text in texts), (name, file, words)
