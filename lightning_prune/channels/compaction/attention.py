"""Multi-head attention from which some heads, or some of the values that make these, were cut."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NarrowAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` after some of its heads, or of the features of its query, were cut.

    The parent class cannot compute attention with ``num_heads * head_dim < embed_dim``, nor on queries of fewer
    features. Names of parameters and arguments of ``forward`` are the same as in the parent class.
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
        """Compute attention; arguments and results are those of the parent class.

        Raises:
            ValueError: If ``attn_mask`` has three dimensions and is not for each of the heads that are left.
        """
        if query.is_nested:
            return self._nested_self_attention(query), None
        single = query.dim() == 2
        inputs = [query, key, value]
        if single:
            inputs = [tensor.unsqueeze(0) for tensor in inputs]
        elif not self.batch_first:
            inputs = [tensor.transpose(0, 1) for tensor in inputs]
        queries, keys, values = self._project(inputs)
        # as in the parent class, where the weights do not matter the hint counts and not the mask
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(queries, keys, attn_mask, key_padding_mask)
        weights: Tensor | None = None
        if need_weights:
            scores = queries @ keys.transpose(-2, -1) * self.head_dim**-0.5
            # 0 where a row is all masked, as fused attention gives, and not nan
            weights = torch._safe_softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, self.dropout, self.training)
            heads = weights @ values
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if single else weights
        else:
            dropout = self.dropout if self.training else 0.0
            heads = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, is_causal=causal)
        result: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if single:
            result = result.squeeze(0)
        elif not self.batch_first:
            result = result.transpose(0, 1)
        return result, weights

    def _mask(
        self, queries: Tensor, keys: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Return the sum of both masks, as a term of the scores; ``None`` if there is none."""
        terms = []
        if attn_mask is not None:
            if attn_mask.dim() == 3:  # a mask for each head of each example
                batch, count = len(queries), self.num_heads
                if len(attn_mask) != batch * count:
                    raise ValueError(
                        f"attn_mask has {len(attn_mask)} masks; this attention has {count} heads, after some"
                        f" were cut, and {batch} sequences: give {batch * count} masks, or one for all."
                    )
                attn_mask = attn_mask.view(batch, count, *attn_mask.shape[1:])
            terms.append(_bias(attn_mask, queries))
        if key_padding_mask is not None:
            terms.append(_bias(key_padding_mask[..., None, None, :], queries))
        return sum(terms[1:], terms[0]) if terms else None

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


def _bias(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask as a term of the scores: for a bool mask, -inf where it is True and 0 elsewhere."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def set_attention_class_(module: nn.Module, *, narrow: bool = False) -> None:
    """Set the class and the widths of an attention module by its parameters; ignore any other module.

    Args:
        module: The module.
        narrow: Whether it has to be a :class:`NarrowAttention` whatever its widths are.
    """
    if type(module) not in (nn.MultiheadAttention, NarrowAttention):
        return
    assert isinstance(module, nn.MultiheadAttention)
    packed = module.in_proj_weight is not None
    matrices = (
        [module.in_proj_weight] * 3
        if packed
        else [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    )
    module.embed_dim, module.kdim, module.vdim = (matrix.shape[1] for matrix in matrices)
    narrow |= len(matrices[0]) != module.embed_dim * (3 if packed else 1)
    # where this is True, nn.TransformerEncoderLayer may run a fused op instead of this module's forward
    module._qkv_same_embed_dim = packed and not narrow
    if module.bias_k is None and not module.add_zero_attn:
        module.__class__ = NarrowAttention if narrow else nn.MultiheadAttention
