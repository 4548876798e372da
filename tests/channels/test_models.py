"""A sample of the table of models that nobody here wrote (docs/zoo.md), and of those written anew for it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import entries

from lightning_prune import Channels, PerLayer, Pruner, compact
from lightning_prune.core.probes import as_probe, relative_difference
from lightning_prune.core.tensors import reachable_tensors

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
PACKAGES = {"image_models": "timm", "decoders": "transformers", "encoders": "transformers"}
# the largest share of the parameters that stays
SAMPLE = [
    ("one_stage", "after YOLOv8", 0.001),
    ("u_nets", "Attention U-Net", 0.01),
    ("u_nets", "Demucs", 0.001),
    ("u_nets", "diffusion U-Net", 0.01),
    ("image_models", "resnet10t", 0.001),
    ("image_models", "nf_regnet_b0", 0.001),
    ("decoders", "LlamaForCausalLM", 0.001),
    ("encoders", "BertForSequenceClassification", 0.01),
    ("encoders", "SqueezeBertForSequenceClassification", 0.02),
]


@pytest.mark.parametrize(("family", "name", "frozen"), SAMPLE, ids=[name for _, name, _ in SAMPLE])
def test_half_of_a_model_goes(family: str, name: str, frozen: float) -> None:
    pytest.importorskip(PACKAGES.get(family, "torch"))
    entry = entries(family)[name]
    model, example = entry.build(), entry.inputs()
    dense = sum(each.numel() for each in model.parameters())
    pruner = Pruner(model, 0.5, structure=Channels(), selector=PerLayer(), schedule=None, example=example)
    covered = sum(model.get_parameter(each).numel() for each in pruner.masks)
    assert 1 - covered / dense <= frozen
    pruner.prune(1.0)
    small = compact(copy.deepcopy(model), pruner.masks, example)
    assert sum(each.numel() for each in small.parameters()) < 0.55 * dense
    probe = as_probe(example).to(torch.float64)
    with torch.no_grad():
        masked, cut = (reachable_tensors(probe(each.double())) for each in (model, small))
    assert len(masked) > 0
    assert relative_difference(masked, cut) < 1e-12


def test_a_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    twice = "import zoo; zoo.main(); saved = open('zoo.json').read(); print('---'); zoo.main(); print('---')"
    twice += "\nprint(saved)"
    arguments = ["--families", "u_nets", "--out", "zoo.json", "--names", "SegNet"]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    command = [sys.executable, "-c", twice, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True, check=True)
    first, again, saved = done.stdout.split("---\n")
    assert first == again
    (row,) = json.loads(saved)
    assert row["difference"] < 1e-12
    assert row["kept"] < 0.5
    assert [row] == json.loads((tmp_path / "zoo.json").read_text())
