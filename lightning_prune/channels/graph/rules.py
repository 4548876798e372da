"""What each ATen op does to labels: one entry an op. Whatever has none freezes the labels that reach it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_prune.channels.graph.calls import Call, Rule
from lightning_prune.channels.graph.coupling_rules import (
    along_last_dims,
    convolution,
    glu,
    in_place_add,
    matmul,
    pointwise,
    reduce,
    sum_rule,
    weight_norm,
)
from lightning_prune.channels.graph.label_fields import Fields
from lightning_prune.channels.graph.movement_rules import (
    along_dim,
    concatenate,
    copy,
    cut_out,
    embedding,
    indexed,
    move,
    pad,
    picked,
    pixel_shuffle,
    reshape,
    restride,
    rolled,
    same,
    split,
    stack,
)
from lightning_prune.channels.graph.norm_rules import batch_norm, group_norm, layer_norm


def unknown(call: Call) -> Sequence[Fields]:
    """Freezes all that reaches it."""
    for tensor in call.tensors:
        call.freeze(call.fields(tensor), f"reaches {call.func}, which has no rule")
    return [() for _ in call.outputs]


# Ops, in words: by name, without overload, and without the underscore of those that work in place.
_ENTRIES: tuple[tuple[Rule, str], ...] = (
    (same, "alias clone contiguous detach lift lift_fresh _to_copy native_dropout bernoulli zero fill"),
    (same, "zeros_like ones_like empty_like rand_like full_like"),
    (copy, "copy"),
    (restride, "as_strided"),
    # the others have a tag that says so
    (pointwise, "hardswish mish rsub _prelu_kernel hardtanh leaky_relu log_sigmoid_forward"),
    (move, "permute transpose t unsqueeze squeeze expand repeat diagonal native_channel_shuffle"),
    (reshape, "view _unsafe_view reshape _reshape_alias"),
    (pixel_shuffle, "pixel_shuffle"),
    (concatenate, "cat"),
    (stack, "stack"),
    (split, "split split_with_sizes unbind chunk"),
    (cut_out, "slice"),
    (picked(along_dim), "select index_select gather"),
    (picked(indexed), "index"),
    (picked(rolled), "roll flip"),
    (pad, "constant_pad_nd"),
    (embedding, "embedding"),
    (along_last_dims(1), "reflection_pad1d replication_pad1d avg_pool1d upsample_nearest1d upsample_linear1d"),
    (along_last_dims(2), "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d"),
    (along_last_dims(2), "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d"),
    (along_last_dims(2), "_upsample_bilinear2d_aa reflection_pad2d replication_pad2d"),
    (along_last_dims(3), "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d"),
    (along_last_dims(3), "upsample_nearest3d upsample_trilinear3d"),
    (sum_rule, "sum linalg_vector_norm"),
    (reduce, "norm mean amax amin max min var var_mean std argmax argmin prod"),
    (reduce, "_softmax _log_softmax _safe_softmax cumsum"),
    (in_place_add, "index_add scatter_add"),
    (weight_norm, "_weight_norm_interface"),
    (glu, "glu"),
    (matmul, "mm addmm bmm baddbmm mv dot vdot"),
    (convolution, "convolution _convolution mkldnn_convolution"),
    (batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    (batch_norm, "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update"),
    (group_norm, "native_group_norm"),
    (layer_norm, "native_layer_norm _fused_rms_norm"),
)
# Ops that fill a tensor with one value.
FILLED = frozenset(["zeros", "ones", "full", "new_zeros", "new_ones", "new_full"])
RULES: dict[str, Rule] = {name: rule for rule, names in _ENTRIES for name in names.split()}


def rule_for(func: Any) -> Rule:
    """The rule of an op: by its name, by its tag if it works element by element, or none."""
    name = func._schema.name.split("::")[-1].rstrip("_")
    if name in RULES:
        return RULES[name]
    return pointwise if torch.Tag.pointwise in func.tags else unknown


def keeps_uniform(func: Any) -> bool:
    """Whether an op makes something with one value everywhere of what has one: not so sums along positions."""
    return (
        rule_for(func) in (same, pointwise, move, reshape)
        and torch.Tag.nondeterministic_seeded not in func.tags
    )
