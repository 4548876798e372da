"""Language models of Hugging Face that go on with a text: small configurations, random weights."""

from __future__ import annotations

from families.hugging_face import SIZES, SPECIAL, WORDS, entry, text

_TEXT = text(use_cache=False)
_MUCH_TEXT = text(8, 16, use_cache=False)  # so that each expert gets tokens
_LLAMA = {**SIZES, **SPECIAL, "num_key_value_heads": 2}
_MANY = {**SIZES, **SPECIAL, "num_key_value_heads": 4}
_EXPERTS = {"experts_implementation": "eager"}
_GPT2 = {"vocab_size": WORDS, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **SPECIAL}

ENTRIES = {
    "GPT2LMHeadModel": entry("GPT2LMHeadModel", _TEXT, _GPT2),
    "GPTBigCodeForCausalLM": entry("GPTBigCodeForCausalLM", _TEXT, _GPT2),
    "GPTNeoForCausalLM": entry(
        "GPTNeoForCausalLM",
        _TEXT,
        _MANY,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    "GPTNeoXForCausalLM": entry("GPTNeoXForCausalLM", _TEXT, _MANY),
    "GPTJForCausalLM": entry("GPTJForCausalLM", _TEXT, _GPT2, rotary_dim=4),
    "CodeGenForCausalLM": entry("CodeGenForCausalLM", _TEXT, _GPT2, rotary_dim=4),
    "OPTForCausalLM": entry("OPTForCausalLM", _TEXT, _MANY, ffn_dim=48, word_embed_proj_dim=32),
    "BloomForCausalLM": entry(
        "BloomForCausalLM", _TEXT, SPECIAL, vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4
    ),
    "MptForCausalLM": entry(
        "MptForCausalLM", _TEXT, SPECIAL, vocab_size=WORDS, d_model=32, n_layers=2, n_heads=4
    ),
    "FalconForCausalLM": entry("FalconForCausalLM", _TEXT, _MANY),
    "LlamaForCausalLM": entry("LlamaForCausalLM", _TEXT, _LLAMA),
    "LlamaForSequenceClassification": entry("LlamaForSequenceClassification", _TEXT, _LLAMA),
    "MistralForCausalLM": entry("MistralForCausalLM", _TEXT, _LLAMA),
    "Qwen2ForCausalLM": entry("Qwen2ForCausalLM", _TEXT, _LLAMA),
    "Qwen3ForCausalLM": entry("Qwen3ForCausalLM", _TEXT, _LLAMA, head_dim=8),
    "GemmaForCausalLM": entry("GemmaForCausalLM", _TEXT, _LLAMA, head_dim=8),
    "Gemma2ForCausalLM": entry("Gemma2ForCausalLM", _TEXT, _LLAMA, head_dim=8),
    "Gemma3ForCausalLM": entry("Gemma3ForCausalLM", _TEXT, _LLAMA, head_dim=8),
    "PhiForCausalLM": entry("PhiForCausalLM", _TEXT, _MANY),
    "Phi3ForCausalLM": entry("Phi3ForCausalLM", _TEXT, _LLAMA),
    "StableLmForCausalLM": entry("StableLmForCausalLM", _TEXT, _LLAMA),
    "Starcoder2ForCausalLM": entry("Starcoder2ForCausalLM", _TEXT, _LLAMA),
    "CohereForCausalLM": entry("CohereForCausalLM", _TEXT, _LLAMA),
    "Olmo2ForCausalLM": entry("Olmo2ForCausalLM", _TEXT, _LLAMA),
    "GraniteForCausalLM": entry("GraniteForCausalLM", _TEXT, _LLAMA),
    "SmolLM3ForCausalLM": entry("SmolLM3ForCausalLM", _TEXT, _LLAMA),
    "GlmForCausalLM": entry("GlmForCausalLM", _TEXT, _LLAMA, head_dim=8),
    "NemotronForCausalLM": entry("NemotronForCausalLM", _TEXT, _LLAMA),
    "BioGptForCausalLM": entry("BioGptForCausalLM", _TEXT, _MANY),
    "MixtralForCausalLM": entry("MixtralForCausalLM", _MUCH_TEXT, _LLAMA, _EXPERTS, num_local_experts=4),
    "Qwen2MoeForCausalLM": entry(
        "Qwen2MoeForCausalLM",
        _MUCH_TEXT,
        _LLAMA,
        _EXPERTS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    "DeepseekV3ForCausalLM": entry(
        "DeepseekV3ForCausalLM",
        _MUCH_TEXT,
        _MANY,
        _EXPERTS,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "GptOssForCausalLM": entry(
        "GptOssForCausalLM",
        _MUCH_TEXT,
        _LLAMA,
        _EXPERTS,
        initializer_range=0.3,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
    ),
    "MambaForCausalLM": entry("MambaForCausalLM", _TEXT, _MANY, state_size=8, time_step_rank=4),
    "Mamba2ForCausalLM": entry(
        "Mamba2ForCausalLM", _TEXT, _MANY, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8
    ),
    "RwkvForCausalLM": entry("RwkvForCausalLM", _TEXT, _MANY, attention_hidden_size=32, context_length=64),
    "RecurrentGemmaForCausalLM": entry(
        "RecurrentGemmaForCausalLM", _TEXT, _LLAMA, num_hidden_layers=3, lru_width=32, attention_window_size=16
    ),
}
