"""Multi-head attention from which some heads were cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NarrowAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` after some of its heads were cut.

    The parent class cannot compute attention with ``num_heads * head_dim < embed_dim``. Names of parameters and
    arguments of ``forward`` are the same as in the parent class.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention; arguments and results are those of the parent class."""
        if query.is_nested:
            return self._nested_self_attention(query), None
        single = query.dim() == 2
        inputs = [query, key, value]
        if single:
            inputs = [tensor.unsqueeze(0) for tensor in inputs]
        elif not self.batch_first:
            inputs = [tensor.transpose(0, 1) for tensor in inputs]
        queries, keys, values = self._project(inputs)
        scores = queries @ keys.transpose(-2, -1) * self.head_dim**-0.5
        if attn_mask is not None:
            if attn_mask.dim() == 3:  # a mask for each head of each example
                attn_mask = attn_mask.view_as(scores)
            scores = scores + _bias(attn_mask, scores)
        if key_padding_mask is not None:
            scores = scores + _bias(key_padding_mask[..., None, None, :], scores)
        # 0 where a row is all masked, as PyTorch's attention gives, and not nan
        weights = F.dropout(torch._safe_softmax(scores, -1), self.dropout, self.training)
        result: Tensor = self.out_proj((weights @ values).transpose(1, 2).flatten(2))
        weights = weights.mean(1) if average_attn_weights else weights
        if single:
            result, weights = result.squeeze(0), weights.squeeze(0)
        elif not self.batch_first:
            result = result.transpose(0, 1)
        return result, weights if need_weights else None

    def _nested_self_attention(self, sequences: Tensor) -> Tensor:
        """Compute self-attention of sequences of different lengths, which ``nn.TransformerEncoder`` passes on.

        It makes a nested tensor of a batch with padding, also where this class computes attention.
        """
        padded = sequences.to_padded_tensor(0)
        lengths = sequences._nested_tensor_size()[:, 0].to(padded.device)
        filled = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        result, _ = self.forward(padded, padded, padded, key_padding_mask=~filled, need_weights=False)
        return torch._nested_tensor_from_mask(result, filled, mask_check=False)

    def _project(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return queries, keys and values, each of shape (batch, heads, positions, head size)."""
        if self.in_proj_weight is not None:
            matrices = self.in_proj_weight.chunk(3)
        else:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [
            F.linear(tensor, matrix, bias).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for tensor, matrix, bias in zip(inputs, matrices, biases, strict=True)
        ]


def _bias(mask: Tensor, scores: Tensor) -> Tensor:
    """Return a mask as a term to add to the scores: for a bool mask, -inf where it is True and 0 elsewhere."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(mask, float("-inf"))


def set_attention_class_(module: nn.Module) -> None:
    """Set the class of an attention module that fits the shapes of its parameters; ignore any other module."""
    if type(module) not in (nn.MultiheadAttention, NarrowAttention):
        return
    assert isinstance(module, nn.MultiheadAttention)
    narrow = module.out_proj.in_features != module.embed_dim
    # where this is True, nn.TransformerEncoderLayer may run a fused op instead of this module's forward
    module._qkv_same_embed_dim = module.in_proj_weight is not None and not narrow
    if module.bias_k is None and not module.add_zero_attn:
        module.__class__ = NarrowAttention if narrow else nn.MultiheadAttention
