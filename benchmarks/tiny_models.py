"""Tiny random models of every class that transformers maps to text generation: its default config, every size small."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

VOCABULARY = 320
H, HEADS, KV, HEAD, INNER, MOE_INNER, EXPERTS = 128, 4, 2, 32, 192, 64, 4

SIZES: dict[str, int] = {}
for _size, _keys in (
    (
        H,
        "hidden_size d_model n_embd embed_dim text_hidden_size out_hidden_size encoder_hidden_size projection_dim dim "
        "projector_hidden_size embedding_size word_embed_proj_dim hidden_dim lru_width emb_dim embedding_dim "
        "attention_hidden_size hidden_size_global decoder_hidden_size image_text_hidden_size "
        "cross_attention_hidden_size input_embedding_size output_embedding_size projection_hidden_size "
        "projection_hidden_dim patch_embed_hidden_size "
        "adapter_in_dim adapter_input_size audio_hidden_size adapter_out_dim image_token_embed_dim "
        "backbone_hidden_size vision_hidden_size output_dim",
    ),
    (
        INNER,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_hidden_size dff dim_ff mlp_dim "
        "feed_forward_size d_inner intermediate_size_mlp dense_intermediate_size speech_encoder_intermediate_size "
        "prefix_dense_intermediate_size projection_intermediate_size alignment_intermediate_size",
    ),
    (
        MOE_INNER,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "expert_ffn_hidden_size moe_hidden_size share_expert_dim shared_intermediate_size "
        "shared_experts_intermediate_size moe_latent_size router_hidden_size",
    ),
    (
        HEADS,
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads "
        "attention_heads swa_num_attention_heads speech_encoder_attention_heads conf_num_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads num_sliding_attention_heads index_n_heads "
        "resampler_n_heads indexer_n_heads",
    ),
    (
        HEAD,
        "head_dim swa_head_dim d_kv kv_channels index_head_dim resampler_head_dim attention_head_dim d_head "
        "attention_head_size dim_head query_pre_attn_scalar indexer_head_dim",
    ),
    (EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k num_experts_per_token moe_top_k top_k_experts zero_expert_num n_groups"),
    (
        1,
        "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers moe_layer_start_index "
        "mamba_n_groups mamba_ngroups",
    ),
    (
        16,
        "qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim state_size "
        "mamba_d_state ssm_state_size rotary_dim",
    ),
    (48, "q_lora_rank"),
    (32, "kv_lora_rank o_lora_rank hidden_size_per_layer_input laurel_rank time_step_rank mamba_dt_rank adapter_rank"),
    (8, "sliding_window index_topk attention_chunk_size"),
    (4, "index_kpool"),
):
    SIZES |= dict.fromkeys(_keys.split(), _size)
SIZES |= {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 32,
    "image_seq_length": 4,
    "num_image_tokens": 4,
    "qk_head_dim": 32,
    "projector_input_dim": H,
    "projector_output_dim": H,
}
MAX_POSITIONS = {"max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_length_"}
LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
    "num_decoder_layers",
    "layers",
    "num_encoder_layers",
    "num_blocks",
    "speech_encoder_layers",
    "t2u_encoder_layers",
    "t2u_decoder_layers",
    "conf_num_hidden_layers",
    "num_layers_per_stack",
    "resampler_depth",
    "aligner_num_add_layers",
)
# Lists with an entry per layer, whose entries are the layer's kind; and lists of layer numbers.
PER_LAYER_KIND = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "indexer_types",
    "no_rope_layers",
    "attn_layers",
    "attention_layers",
)
NUMBERS = (
    "mlp_only_layers",
    "moe_layers",
    "full_attn_idxs",
    "cross_attention_layers",
    "hybrid_layer_ids",
    "global_attn_indexes",
    "fullatt_block_indexes",
    "deepstack_visual_indexes",
    "local_layer_ids",
    "attn_layer_indices",
    "kv_source_layers",
    "ple_layer_ids",
)


def shrink(config: dict, text: bool = True) -> dict:
    """A config's dict, every size in it small; nested configs too."""
    layers_key = next((key for key in LAYERS if isinstance(config.get(key), int)), None)
    count = config.get(layers_key, 0) if layers_key else 0
    kept = kinds_of_layers(config, count)
    small = {}
    for key, value in config.items():
        if key == "per_layer_config" and isinstance(value, dict):
            inner = {int(number): entry for number, entry in value.items()}
            small[key] = {str(kept.index(n)): small_entry(inner[n]) for n in kept if n in inner}
            continue
        if key == "head_dim" and value is None:
            small[key] = HEAD
            continue
        if key in ("transformers_version", "_name_or_path", "architectures", "id2label", "label2id", "dtype"):
            continue
        if isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            small[key] = shrink(value)
        elif key in LAYERS and isinstance(value, int) and value > 2:
            small[key] = len(kept) if key == layers_key else 2
        elif key in NUMBERS and isinstance(value, list):
            small[key] = [kept.index(number) for number in value if number in kept]
            if len(value) == count and len(small[key]) != len(kept):
                small[key] = list(range(len(kept)))
        elif isinstance(value, (list, tuple)) and count > 2 and len(value) == count:
            small[key] = [value[number] for number in kept]
        elif key.endswith("num_key_value_heads") or key in ("num_kv_heads", "num_query_groups"):
            heads = config.get(
                key.replace("num_key_value_heads", "num_attention_heads"), config.get("num_attention_heads")
            )
            small[key] = value if value is None or value == 1 else HEADS if value == heads else KV
        elif key == "vocab_size" or (key.endswith("vocab_size") and isinstance(value, int) and value > VOCABULARY):
            small[key] = VOCABULARY if value is not None else None
        elif key in MAX_POSITIONS and isinstance(value, int):
            small[key] = min(value, 512)
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            small[key] = min(SIZES[key], value)
        else:
            small[key] = copy.deepcopy(value)
    for key in ("qk_rope_head_dim", "qk_head_dim"):
        if config.get("qk_rope_head_dim") and config.get("head_dim") == config.get(key):
            small["head_dim"] = small[key]
            break
    heads = next(
        (config[key] for key in ("num_attention_heads", "num_heads") if isinstance(config.get(key), int)), None
    )
    if heads and isinstance(config.get("hidden_size"), int):
        for key in ("rope_parameters", "rope_scaling"):
            scale_sections(small.get(key), config.get("head_dim") or config["hidden_size"] / heads)
    if str(config.get("model_type")).startswith(MROPE) and isinstance(small.get("rope_parameters"), dict):
        whole = round(small.get("head_dim", HEAD) * small["rope_parameters"].get("partial_rotary_factor", 1) / 2)
        if sum(small["rope_parameters"].get("mrope_section", [])) != whole:
            sections = [whole - 2 * (whole * 3 // 8), whole * 3 // 8, whole * 3 // 8]
            first_alike = str(config["model_type"]).startswith("ernie4_5_vl")
            small["rope_parameters"]["mrope_section"] = sections[::-1] if first_alike else sections
    return tokens_inside(small)


# Their code has sections of a default, large head where the config names none.
MROPE = (
    "glm4v",
    "glm46v",
    "glm_ocr",
    "glmga",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_omni",
    "paddleocr",
    "ernie4_5_vl",
    "cosmos3",
)


def small_entry(entry: dict) -> dict:
    """Of per_layer_config: what one layer has otherwise."""
    small = {key: 64 if key == "head_dim" else SIZES.get(key, KV) for key in entry}
    if entry.get("num_key_value_heads") == entry.get("num_attention_heads", ""):
        small["num_key_value_heads"] = HEADS
    return small


def scale_sections(rope: object, head: float) -> None:
    """mrope_section: the parts of half a head's rotated values."""
    if isinstance(rope, dict):
        for value in rope.values():
            scale_sections(value, head)
        sections = rope.get("mrope_section")
        if isinstance(sections, (list, tuple)) and sections:
            total = round(sum(sections) * HEAD / head)
            scaled = [max(1, round(part * HEAD / head)) for part in sections]
            scaled[0] += total - sum(scaled)
            rope["mrope_section"] = scaled


def kinds_of_layers(config: dict, count: int) -> list[int]:
    """The numbers of the layers to keep: the first of each kind, at least two."""
    kinds: dict[tuple, int] = {}
    for number in range(count):
        kind = []
        for key in PER_LAYER_KIND:
            values = config.get(key)
            if isinstance(values, (list, tuple)) and len(values) == count:
                kind.append(str(values[number]))
        for key in NUMBERS:
            if isinstance(config.get(key), list) and key != "kv_source_layers" and len(config[key]) != count:
                kind.append(number in config[key])
        kind.append(str((config.get("per_layer_config") or {}).get(f"{number:02}")))
        kinds.setdefault(tuple(kind), number)
    kept = sorted(kinds.values())[:6]
    kept += [number for number in range(count) if number not in kept][: max(0, 2 - len(kept))]
    return sorted(kept)


TOKEN = re.compile(r"token_(id|index)$|^(im|image|video|slice|newline)_\w*_?id$")


def tokens_inside(config: dict) -> dict:
    """Special tokens within the small vocabulary: the usual three first, the others at its end."""
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 3}
    for key in list(config):
        value = config[key]
        if key in usual and isinstance(value, (int, list)) and not isinstance(value, bool):
            config[key] = usual[key]
        elif TOKEN.search(key) and isinstance(value, int) and value > 250:
            config[key] = 256 + sum(map(ord, key)) % 60
    return config


def merge(base: dict, extra: dict) -> dict:
    for key, value in extra.items():
        if value is DROP:
            base.pop(key, None)
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value
    return base


DROP = object()
# What the rules above get wrong, by model type; applied to a config of that type wherever it is nested.
OVERRIDES: dict[str, dict] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "ministral": {"head_dim": HEAD},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD, "num_experts": 4, "moe_topk": 2},
    "nemotron": {"num_key_value_heads": KV},
    "mamba2": {"num_heads": 8, "head_dim": 32, "n_groups": 2},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 32, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 32, "layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 256,
        "attention_head_dim": 64,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 256,
        "hybrid_layer_ids": [1, 3],
        "attention_head_dim": 64,
        "mamba_headdim": 32,
        "n_mamba_heads": 8,
    },
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0, 1, 1, 1]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "step3p5": {"sliding_window": 8},
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4, 4]}},
    "blip-2": {"image_token_index": 300},
    "instructblip": {"image_token_index": 300},
    "instructblipvideo": {"video_token_index": 300},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "intermediate_size": [INNER] * 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": KV, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "reformer": {"axial_pos_embds": False, "num_buckets": 8, "is_decoder": True},
    "blt": {"encoder_hash_byte_group_vocab": 200},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 500,
        "ple_embed_dim": 64,
        "split_ngram_parts": 4,
        "hc_lowrank": 32,
    },
}
# The same class with other settings, since the defaults show only a part of it: name -> (type, overrides).
VARIANTS: dict[str, tuple[str, dict]] = {
    "gemma4_text+moe": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    ),
    "gemma4_text+kv_shared": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "per_layer_config": {"1": {"head_dim": 64}, "3": {"head_dim": 64}},
        },
    ),
    "granitemoehybrid+dense": ("granitemoehybrid", {"num_local_experts": 0}),
    "llama+tied": ("llama", {"tie_word_embeddings": True}),
    "phi3+longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 16,
                "long_factor": [1.0] * 16,
                "original_max_position_embeddings": 256,
            }
        },
    ),
    "falcon+new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "opt+projected": ("opt", {"word_embed_proj_dim": 64}),
    "nemotron_h+latent": ("nemotron_h", {"moe_latent_size": 64}),
    "deepseek_v3+noqlora": ("deepseek_v3", {"q_lora_rank": None}),
}


def apply_overrides(config: dict) -> dict:
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            apply_overrides(value)
    return merge(config, OVERRIDES.get(config.get("model_type", ""), {}))


def tiny_config(model_type: str) -> Any:
    """Raises whatever the class raises on a config that it does not take."""
    model_type, extra = VARIANTS.get(model_type, (model_type, {}))

    config_class = CONFIG_MAPPING[model_type]
    if model_type in ("encoder-decoder", "vision-encoder-decoder"):
        decoder = tiny_config("bert")
        decoder.is_decoder = decoder.add_cross_attention = True
        encoder = tiny_config("bert" if model_type == "encoder-decoder" else "vit")
        config = config_class.from_encoder_decoder_configs(encoder, decoder)
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        return config
    if model_type == "gemma4_assistant":
        sizes = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 0}
        text = CONFIG_MAPPING["gemma4_text"](**sizes)
        default = config_class(text_config=text).to_dict()
    else:
        default = config_class().to_dict()
    small = merge(apply_overrides(shrink(default)), extra)
    small.pop("model_type", None)
    return config_class(**small)


def reinitialise(model: Any) -> None:
    """Every linear maps unit variance to unit variance, so that an error anywhere shows in the logits."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_floating_point():
                    continue
                if isinstance(module, nn.Linear) and name == "weight":
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                elif isinstance(module, Conv1D) and name == "weight":
                    parameter.normal_(std=parameter.shape[0] ** -0.5)
                elif (
                    parameter.ndim == 3
                    and not isinstance(module, nn.modules.conv._ConvNd)
                    and min(parameter.shape[1:]) >= 16
                ):
                    parameter.normal_(std=H**-0.5)
                elif not bool(torch.isfinite(parameter).all()):
                    parameter.normal_(std=0.02)
                elif name == "bias" and isinstance(module, nn.Linear):
                    parameter.normal_(std=0.1)
