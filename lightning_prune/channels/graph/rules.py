"""The table from op to the rule for its labels. An op without a rule freezes the labels of its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_prune.channels.graph import convolution_rules as convolution
from lightning_prune.channels.graph import coupling_rules as coupling
from lightning_prune.channels.graph import movement_rules as movement
from lightning_prune.channels.graph import norm_rules as norm
from lightning_prune.channels.graph import position_rules as position
from lightning_prune.channels.graph import recurrent_rules as recurrent
from lightning_prune.channels.graph.calls import Call, Rule
from lightning_prune.channels.graph.label_fields import Fields


def unknown(call: Call) -> Sequence[Fields]:
    """Freeze the labels of all inputs: the rule for ops that are not in the table."""
    for tensor in call.tensors:
        call.freeze(call.fields(tensor), f"feeds {call.title}, which is not followed")
    return [() for _ in call.outputs]


# Rule and op names, separated by spaces, without overload and without the trailing underscore of in-place ops;
# with their namespace if they are not PyTorch's own.
_ENTRIES: tuple[tuple[Rule, str], ...] = (
    (
        movement.same,
        "alias clone contiguous detach lift lift_fresh _to_copy native_dropout bernoulli zero fill",
    ),
    (movement.same, "zeros_like ones_like empty_like rand_like full_like"),
    (movement.same, "conj _conj _neg_view resolve_conj resolve_neg"),
    (movement.made_anew, "new_zeros new_ones new_full new_empty new_empty_strided"),
    (movement.copy, "copy"),
    (movement.restride, "as_strided"),
    # pointwise ops without the torch.Tag.pointwise that rule_for checks
    (
        coupling.pointwise,
        "hardswish mish rsub _prelu_kernel hardtanh leaky_relu log_sigmoid_forward masked_fill",
    ),
    (movement.move, "permute transpose t unsqueeze squeeze diagonal pixel_unshuffle"),
    (movement.repeat, "expand repeat"),
    (movement.reshape, "view _unsafe_view reshape _reshape_alias"),
    (movement.pixel_shuffle, "pixel_shuffle"),
    (movement.channel_shuffle, "channel_shuffle native_channel_shuffle"),
    (movement.concatenate, "cat"),
    (movement.stack, "stack"),
    (movement.split, "split split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk"),
    (movement.unbind, "unbind"),
    (movement.cut_out, "slice"),
    (movement.picked(movement.along_dim), "select index_select"),
    (movement.picked(movement.along_dimension), "unfold"),
    (position.gather, "gather"),
    (position.index_put, "index_put"),
    (movement.picked(movement.indexed), "index"),
    (movement.picked(movement.rolled), "roll flip"),
    (movement.pad, "constant_pad_nd"),
    (movement.embedding, "embedding _embedding_bag _embedding_bag_forward_only"),
    (movement.as_complex, "view_as_complex"),
    (movement.as_real, "view_as_real"),
    (position.unfold, "im2col"),
    (position.fold, "col2im"),
    (position.sampled(-2, -1), "grid_sampler_2d cudnn_grid_sampler"),
    (position.sampled(-3, -2, -1), "grid_sampler_3d"),
    (position.sampled(0, -2, -1), "torchvision::roi_align torchvision::roi_pool"),
    (coupling.along_last_dims(1), "avg_pool1d reflection_pad1d replication_pad1d"),
    (coupling.along_last_dims(1), "upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d"),
    (
        coupling.along_last_dims(2),
        "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d",
    ),
    (
        coupling.along_last_dims(2),
        "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d",
    ),
    (coupling.along_last_dims(2), "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"),
    (coupling.along_last_dims(2), "reflection_pad2d replication_pad2d max_unpool2d tril triu"),
    (coupling.along_last_dims(3), "max_pool3d_with_indices avg_pool3d"),
    (coupling.along_last_dims(3), "_adaptive_avg_pool3d adaptive_max_pool3d"),
    (coupling.along_last_dims(3), "max_unpool3d reflection_pad3d replication_pad3d"),
    (coupling.along_last_dims(3), "upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d"),
    (coupling.sum_rule, "sum linalg_vector_norm"),
    (coupling.reduce, "norm mean amax amin max min var var_mean std argmax argmin prod"),
    (coupling.reduce, "logsumexp any all sort topk median nanmedian kthvalue mode"),
    (coupling.reduce, "_softmax _log_softmax _safe_softmax cumsum cumprod cummax cummin logcumsumexp"),
    (coupling.reduce, "_fft_r2c _fft_c2r _fft_c2c"),
    (coupling.scatter, "index_add scatter_add scatter scatter_reduce index_reduce index_copy"),
    (coupling.weight_norm, "_weight_norm_interface"),
    (coupling.glu, "glu"),
    (coupling.matmul, "mm addmm bmm baddbmm mv dot vdot _sparse_addmm"),
    (coupling.trilinear, "_trilinear"),
    (coupling.distances, "_cdist_forward _euclidean_dist"),
    (convolution.convolution, "convolution _convolution mkldnn_convolution"),
    (convolution.deformed_convolution, "torchvision::deform_conv2d"),
    (norm.batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    (norm.batch_norm, "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update"),
    (norm.group_norm, "native_group_norm"),
    (norm.layer_norm, "native_layer_norm _fused_rms_norm"),
    (recurrent.recurrent, "lstm lstm_cell gru gru_cell rnn_tanh rnn_tanh_cell rnn_relu rnn_relu_cell"),
    (recurrent.pack, "_pack_padded_sequence"),
    (recurrent.unpack, "_pad_packed_sequence"),
)
# Ops that create a tensor with one value everywhere, or with values that nothing reads.
_FILLED = frozenset(["zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"])
# Ops that take elements of their first tensor.
_TAKING = frozenset(["select", "index_select", "slice", "split", "split_with_sizes", "unbind"])
# Ops whose rule gives labels to tensors that have none.
REPEATING = frozenset(["expand", "repeat"])
RULES: dict[str, Rule] = {name: rule for rule, names in _ENTRIES for name in names.split()}


def register_rule(op: str, rule: Rule | str) -> None:
    """Let channels be followed through an op of your own, in this process.

    A rule only proposes what may go together: each group of channels is cut on trial before any is pruned.

    Args:
        op: The name of the op, with its namespace, such as ``"mylib::scale"``; a rule that it has is replaced.
        rule: A function of a :class:`Call` that returns the label fields of each output, or the name of an op
            of PyTorch that does the same to channels, such as ``"relu"``. Arguments that the latter's rule
            reads, such as ``dim``, have the same names.

    Raises:
        ValueError: If ``op`` has no namespace, or ``rule`` is the name of an op that has no rule.

    >>> register_rule("mylib::scale", "mul")
    """
    if not all(op.partition("::")):
        raise ValueError(f"op={op!r} must be a name with its namespace, such as 'mylib::scale'.")
    found = rule if callable(rule) else RULES.get(rule, coupling.pointwise if _is_pointwise(rule) else None)
    if found is None:
        raise ValueError(
            f"rule={rule!r} must be a function of a Call, or the name of an op that is pointwise or among"
            f" {sorted(RULES)}."
        )
    RULES[op.removeprefix("aten::")] = found


def _is_pointwise(name: str) -> bool:
    """Return whether torch tags an op of its own as pointwise."""
    single = getattr(torch.ops.aten, name, None)
    return single is not None and torch.Tag.pointwise in getattr(single, single.overloads()[0]).tags


def rule_for(call: Call) -> Rule:
    """Return the rule of an op: by name, else ``pointwise`` if torch tags it as such, else ``unknown``.

    An op on lists, such as ``_foreach_lerp_``, is pointwise if the op on tensors is.
    """
    name = call.name.rstrip("_")
    if name.startswith("_foreach_"):
        pointwise = _is_pointwise(name.removeprefix("_foreach_")) or name == "_foreach_copy"
        return coupling.each_pointwise if pointwise else unknown
    return RULES.get(call.key, coupling.pointwise if torch.Tag.pointwise in _tags(call) else unknown)


def _tags(call: Call) -> Sequence[torch.Tag]:
    return getattr(call.func, "tags", ())


def is_filled(call: Call) -> bool:
    """Return whether an op gives tensors with one value everywhere.

    Those that create such tensors do, and those that map them to others; not random ops, nor ops that depend on
    the index, such as a cumulative sum.
    """
    name = call.key
    if name in _FILLED or (name == "lift_fresh" and call.tensors[0].numel() == 1):  # a number in the code
        return True
    read = call.tensors[:1] if name in _TAKING else call.tensors
    kept = name in _TAKING or rule_for(call) in (
        movement.same,
        coupling.pointwise,
        movement.move,
        movement.repeat,
        movement.reshape,
    )
    random = torch.Tag.nondeterministic_seeded in _tags(call)
    return bool(read) and all(map(call.is_uniform, read)) and kept and not random
