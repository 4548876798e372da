"""Language models of Hugging Face that read a text, or two: small configurations, random weights."""

from __future__ import annotations

from families.hugging_face import BART, SIZES, SPECIAL, T5, WORDS, entry, text, text_to_text

_TEXT = text()
_BERT = {**SIZES, "pad_token_id": 0}
_BART = {**BART, **SPECIAL, "decoder_start_token_id": 2}
_T5 = {**T5, "pad_token_id": 0, "decoder_start_token_id": 0}
_XL = {"vocab_size": WORDS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}

ENTRIES = {
    "BertModel": entry("BertModel", _TEXT, _BERT),
    "BertForMaskedLM": entry("BertForMaskedLM", _TEXT, _BERT),
    "BertForSequenceClassification": entry("BertForSequenceClassification", _TEXT, _BERT),
    "RobertaForTokenClassification": entry("RobertaForTokenClassification", _TEXT, _BERT),
    "XLMRobertaForSequenceClassification": entry("XLMRobertaForSequenceClassification", _TEXT, _BERT),
    "DistilBertForSequenceClassification": entry(
        "DistilBertForSequenceClassification",
        _TEXT,
        vocab_size=WORDS,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
    ),
    "AlbertForMaskedLM": entry("AlbertForMaskedLM", _TEXT, _BERT, embedding_size=16),
    "ElectraForPreTraining": entry("ElectraForPreTraining", _TEXT, _BERT, embedding_size=16),
    "DebertaForSequenceClassification": entry(
        "DebertaForSequenceClassification", _TEXT, _BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "DebertaV2ForSequenceClassification": entry(
        "DebertaV2ForSequenceClassification",
        _TEXT,
        _BERT,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
    ),
    "MPNetForMaskedLM": entry("MPNetForMaskedLM", _TEXT, _BERT),
    "ModernBertForMaskedLM": entry(
        "ModernBertForMaskedLM", _TEXT, _BERT, SPECIAL, cls_token_id=1, sep_token_id=2
    ),
    "MobileBertForMaskedLM": entry(
        "MobileBertForMaskedLM", _TEXT, _BERT, embedding_size=32, intra_bottleneck_size=16, true_hidden_size=16
    ),
    "SqueezeBertForSequenceClassification": entry(
        "SqueezeBertForSequenceClassification", _TEXT, _BERT, embedding_size=32
    ),
    "RoFormerForMaskedLM": entry("RoFormerForMaskedLM", _TEXT, _BERT, embedding_size=32),
    "ConvBertForSequenceClassification": entry(
        "ConvBertForSequenceClassification", _TEXT, _BERT, embedding_size=32
    ),
    "FNetForMaskedLM": entry("FNetForMaskedLM", lambda: {"input_ids": _TEXT()["input_ids"]}, _BERT),
    "FunnelForSequenceClassification": entry(
        "FunnelForSequenceClassification", _TEXT, _XL, d_head=8, block_sizes=[1, 1], num_decoder_layers=1
    ),
    "NystromformerForMaskedLM": entry(
        "NystromformerForMaskedLM", _TEXT, _BERT, num_landmarks=10, segment_means_seq_len=10
    ),
    "LongformerForMaskedLM": entry("LongformerForMaskedLM", _TEXT, _BERT, attention_window=4, sep_token_id=2),
    "BigBirdForMaskedLM": entry("BigBirdForMaskedLM", _TEXT, _BERT, attention_type="original_full"),
    "XLNetForSequenceClassification": entry("XLNetForSequenceClassification", _TEXT, _XL),
    "CanineForSequenceClassification": entry(
        "CanineForSequenceClassification", text(), _BERT, local_transformer_stride=8, downsampling_rate=2
    ),
    "EsmForMaskedLM": entry("EsmForMaskedLM", _TEXT, _BERT, mask_token_id=3, position_embedding_type="rotary"),
    "BartForConditionalGeneration": entry("BartForConditionalGeneration", text_to_text, _BART),
    "MBartForConditionalGeneration": entry("MBartForConditionalGeneration", text_to_text, _BART),
    "PegasusForConditionalGeneration": entry("PegasusForConditionalGeneration", text_to_text, _BART),
    "MarianMTModel": entry("MarianMTModel", text_to_text, _BART, decoder_vocab_size=WORDS),
    "M2M100ForConditionalGeneration": entry("M2M100ForConditionalGeneration", text_to_text, _BART),
    "BlenderbotForConditionalGeneration": entry("BlenderbotForConditionalGeneration", text_to_text, _BART),
    "LEDForConditionalGeneration": entry(
        "LEDForConditionalGeneration",
        text_to_text,
        _BART,
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    "ProphetNetForConditionalGeneration": entry(
        "ProphetNetForConditionalGeneration",
        text_to_text,
        SPECIAL,
        vocab_size=WORDS,
        hidden_size=32,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        ngram=2,
    ),
    "T5ForConditionalGeneration": entry("T5ForConditionalGeneration", text_to_text, _T5),
    "T5EncoderModel": entry("T5EncoderModel", _TEXT, _T5),
    "MT5ForConditionalGeneration": entry(
        "MT5ForConditionalGeneration", text_to_text, _T5, feed_forward_proj="gated-gelu"
    ),
    "LongT5ForConditionalGeneration": entry(
        "LongT5ForConditionalGeneration", text_to_text, _T5, local_radius=4, encoder_attention_type="local"
    ),
    "SwitchTransformersForConditionalGeneration": entry(
        "SwitchTransformersForConditionalGeneration",
        lambda: text_to_text(16),  # so that each expert gets tokens
        _T5,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
    ),
}
