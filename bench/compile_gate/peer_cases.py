"""Triton kernels of vLLM and FlashInfer as the compile gate wants them, each beside ours that does its work.

Shapes are ours (`engine.kernels.shipped`); constants, warps and stages are what the project's own launcher takes for
them on an NVIDIA GPU. docs/kernels.md says which versions were read. FlashInfer's attention is CUDA C++ and has no row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.compile_gate.peer_sources import find_kernel
from engine.kernels.compile_case import CompileCase, CompileConfig
from engine.kernels.shipped import SHIPPED, ModelShape

LLAMA = SHIPPED[0]
_UNIFIED = "vllm.v1.attention.ops.triton_unified_attention"
_HELPERS = "vllm.v1.attention.ops.triton_attention_helpers"
_DECODE = "vllm.v1.attention.ops.triton_decode_attention"
_PREFIX = "vllm.v1.attention.ops.prefix_prefill"
_CACHE = "vllm.v1.attention.ops.triton_reshape_and_cache_flash"
_INVARIANT = "vllm.model_executor.layers.batch_invariant"
_MIN_P = "vllm.v1.worker.gpu.sample.min_p"
_GUMBEL = "vllm.v1.worker.gpu.sample.gumbel"
_TOP = "vllm.v1.sample.ops.topk_topp_triton"
_FI = "flashinfer.triton.kernels"
MODULES = {
    "vllm": (_UNIFIED, _HELPERS, _DECODE, _PREFIX, _CACHE, _INVARIANT, _MIN_P, _GUMBEL, _TOP),
    "flashinfer": (f"{_FI}.norm", f"{_FI}.activation", f"{_FI}.cascade", f"{_FI}.quant", f"{_FI}.sm_constraint_gemm"),
}
SMS = 132
SEGMENTS = 16  # vLLM's NUM_PAR_SOFTMAX_SEGMENTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """`ours`: operation, case and shape in COMPILE_CASES that `case` stands beside."""

    package: str
    ours: tuple[str, str, str]
    case: CompileCase


def _peer(
    module: str,
    kernel: str,
    ours: tuple[str, str, str],
    types: Mapping[str, str],
    constants: Mapping[str, Any] | Callable[[int], Mapping[str, Any]],
    *,
    unaligned: tuple[str, ...] = (),
    warps: int = 4,
    stages: int = 3,
    flops: int = 1,
    has_dot: bool = False,
    note: str = "",
) -> Peer:
    """Triton's defaults are 4 warps and 3 stages."""

    def config(arch: int) -> CompileConfig:
        chosen = constants(arch) if callable(constants) else constants
        return CompileConfig(constants=chosen, num_warps=warps, num_stages=stages)

    case = CompileCase(
        name=kernel + note,
        kernel=lambda: find_kernel(module, kernel),
        shape=ours[2],
        signature=types,
        aligned=tuple(name for name, kind in types.items() if kind != "fp32" and name not in unaligned),
        config=config,
        flops=flops,
        bytes=1,
        has_dot=has_dot,
        archs=(90, 100) if "fp8" in ours[2] else (80, 90, 100),
    )
    return Peer(package=module.split(".")[0], ours=ours, case=case)


def _heads(model: ModelShape, kv: str) -> str:
    return f"{model.name} {model.heads}/{model.kv_heads} heads of {model.head_dim}, KV {kv}"


_KV = {"bf16": ("*bf16", 0), "int8": ("*i8", 2), "fp8": ("*fp8e4nv", 3)}


def _unified(model: ModelShape, kv: str, *, decode: bool) -> Peer:
    """`unified_attention`, which prompts and decodes take; decodes of few sequences in 16 segments (3D)."""
    kv_type, mode = _KV[kv]
    partial = "*fp32" if decode else "*bf16"
    keys = 32 if not decode else 16
    long_strides = (
        "block_table_stride", "query_stride_0", "query_stride_1", "output_stride_0", "output_stride_1",
        "qq_bias_stride_0", "stride_k_cache_0", "stride_k_cache_1", "stride_k_cache_2", "stride_v_cache_0",
        "stride_v_cache_1", "stride_v_cache_2", "stride_ks_blk", "stride_ks_slot", "stride_vs_blk", "stride_vs_slot",
    )  # fmt: skip
    scales = "*fp32" if mode else kv_type
    types = {
        "output_ptr": "*bf16", "segm_output_ptr": partial, "segm_max_ptr": partial, "segm_expsum_ptr": partial,
        "query_ptr": "*bf16", "key_cache_ptr": kv_type, "value_cache_ptr": kv_type, "block_tables_ptr": "*i32",
        "seq_lens_ptr": "*i32", "k_scale_cache_ptr": scales, "v_scale_cache_ptr": scales, "scale": "fp32",
        "k_scale": "*fp32", "v_scale": "*fp32", "softcap": "fp32",
        **dict.fromkeys(long_strides, "i64"), "query_start_len_ptr": "*i32", "num_seqs": "i32",
    }  # fmt: skip
    group = model.heads // model.kv_heads
    constants = {
        "sink_ptr": None, "alibi_slopes_ptr": None, "qq_bias_ptr": None, "mm_prefix_range_ptr": None,
        "out_scale": None, "num_query_heads": model.heads, "num_queries_per_kv": group, "BLOCK_SIZE": 16,
        "TILE_SIZE": keys, "HEAD_SIZE": model.head_dim, "HEAD_SIZE_PADDED": model.head_dim,
        "USE_ALIBI_SLOPES": False, "USE_ALIBI_SQRT": False, "USE_QQ_BIAS": False, "USE_SOFTCAP": False,
        "USE_SINKS": False, "SLIDING_WINDOW": 0, "USE_MM_PREFIX": False, "MAX_MM_RANGES": 0, "stride_k_cache_3": 1,
        "stride_v_cache_3": 1, "stride_ks_head": 1, "stride_vs_head": 1, "BLOCK_Q": 16 // group, "BLOCK_M": 16,
        "NUM_SEGMENTS_PER_SEQ": SEGMENTS if decode else 1, "USE_FP8": False, "IS_3D": decode, "KV_QUANT_MODE": mode,
        "FP8_MIN": -448.0, "FP8_MAX": 448.0, "CHUNK_LOOKBACK": -1, "CHUNK_SIZE": -1,
    }  # fmt: skip
    return _peer(
        _UNIFIED, "kernel_unified_attention",
        ("attention", f"attention {'decode' if decode else 'prefill'}", _heads(model, kv)), types, constants,
        # Slots of a block are [slot, KV head]: eight heads apart.
        unaligned=("num_seqs", "block_table_stride", "stride_ks_slot", "stride_vs_slot"),
        flops=4 * 16 * keys * model.head_dim, has_dot=True, note=", 3D" if decode else ", 2D",
    )  # fmt: skip


def _reduce_segments() -> Peer:
    types = {
        "output_ptr": "*bf16", "segm_output_ptr": "*fp32", "segm_max_ptr": "*fp32", "segm_expsum_ptr": "*fp32",
        "seq_lens_ptr": "*i32", "num_seqs": "i32", "out_scale_inv": "fp32", "output_stride_0": "i64",
        "output_stride_1": "i64", "block_table_stride": "i64", "query_start_len_ptr": "*i32",
    }  # fmt: skip
    constants = {
        "num_query_heads": LLAMA.heads, "TILE_SIZE": 16, "HEAD_SIZE": 128, "HEAD_SIZE_PADDED": 128, "BLOCK_Q": 4,
        "NUM_SEGMENTS_PER_SEQ": SEGMENTS, "USE_FP8": False, "FP8_MIN": -448.0, "FP8_MAX": 448.0,
    }  # fmt: skip
    ours = ("attention", "attention combine", "Llama-8B 32/8 heads of 128")
    return _peer(_UNIFIED, "reduce_segments", ours, types, constants, unaligned=("num_seqs", "block_table_stride"))


def _grouped_decode(model: ModelShape) -> Peer:
    """Split decode after LightLLM and SGLang: 32 keys at a time, 8 splits."""
    strides = (
        "stride_req_to_tokens_b", "stride_qbs", "stride_qh", "stride_buf_kbs", "stride_buf_kh", "stride_buf_vbs",
        "stride_buf_vh", "stride_mid_ob", "stride_mid_oh", "stride_mid_os",
    )  # fmt: skip
    types = {
        "Q": "*bf16", "K_Buffer": "*bf16", "V_Buffer": "*bf16", "sm_scale": "fp32", "Req_to_tokens": "*i32",
        "B_Seqlen": "*i32", "Att_Out": "*fp32", **dict.fromkeys(strides, "i32"), "k_scale": "*fp32",
        "v_scale": "*fp32",
    }  # fmt: skip
    constants = {
        "kv_group_num": model.heads // model.kv_heads, "q_head_num": model.heads, "BLOCK_DMODEL": model.head_dim,
        "BLOCK_DPE": 0, "BLOCK_DV": model.head_dim, "BLOCK_N": 32, "BLOCK_H": 16, "NUM_KV_SPLITS": 8, "PAGE_SIZE": 16,
        "logit_cap": 0.0, "Lk": model.head_dim, "Lv": model.head_dim, "IS_MLA": False,
    }  # fmt: skip
    return _peer(
        _DECODE, "_fwd_grouped_kernel_stage1", ("attention", "attention decode", _heads(model, "bf16")), types,
        constants, stages=2, flops=4 * 16 * 32 * model.head_dim, has_dot=True,
        # A row of the intermediate result is a head's dimensions and its log-sum-exp.
        unaligned=("stride_req_to_tokens_b", "stride_mid_ob", "stride_mid_oh", "stride_mid_os"),
    )  # fmt: skip


def _decode_stage2() -> Peer:
    strides = ("stride_mid_ob", "stride_mid_oh", "stride_mid_os", "stride_obs", "stride_oh", "stride_lse_bs")
    types = {
        "Mid_O": "*fp32", "o": "*bf16", "lse": "*bf16", "B_Seqlen": "*i32", **dict.fromkeys(strides, "i32"),
    }  # fmt: skip
    return _peer(
        _DECODE, "_fwd_kernel_stage2", ("attention", "attention combine", "Llama-8B 32/8 heads of 128"), types,
        {"NUM_KV_SPLITS": 8, "BLOCK_DV": 128, "Lv": 128}, stages=2,
        unaligned=("stride_mid_ob", "stride_mid_oh", "stride_mid_os"),
    )  # fmt: skip


def _prefix_prefill(model: ModelShape) -> Peer:
    """The older kernel of chunks over a cache in pieces of 8 numbers of a head."""
    strides = (
        "stride_b_loc_b", "stride_qbs", "stride_qh", "stride_kbs", "stride_kh", "stride_vbs", "stride_vh",
        "stride_obs", "stride_oh", "stride_k_cache_bs", "stride_k_cache_h", "stride_k_cache_d", "stride_v_cache_bs",
        "stride_v_cache_h", "stride_v_cache_d",
    )  # fmt: skip
    types = {
        **dict.fromkeys(("Q", "K", "V", "K_cache", "V_cache", "Out"), "*bf16"), "B_Loc": "*i32", "sm_scale": "fp32",
        "k_scale": "*fp32", "v_scale": "*fp32", "out_scale_inv": "fp32", "B_Start_Loc": "*i32", "B_Seqlen": "*i32",
        **dict.fromkeys(strides, "i32"),
    }  # fmt: skip
    constants = {
        "sink_ptr": None, "x": 8, "stride_b_loc_s": 1, "stride_qd": 1, "stride_kd": 1, "stride_vd": 1, "stride_od": 1,
        "stride_k_cache_bl": 8, "stride_k_cache_x": 1, "stride_v_cache_bl": 1, "IN_PRECISION": None,
        "num_queries_per_kv": model.heads // model.kv_heads, "BLOCK_M": 128, "BLOCK_DMODEL": model.head_dim,
        "BLOCK_DMODEL_PADDED": model.head_dim, "BLOCK_SIZE": 32, "PHYSICAL_BLOCK_SIZE": 16, "BLOCK_N": 64,
        "SLIDING_WINDOW": 0, "num_unroll_cache": 4, "num_unroll_request": 1, "SKIP_DECODE": True, "USE_SINKS": False,
        "USE_FP8": False, "CAUSAL": True, "MAX_Q_LEN": 0, "MAX_CTX_LEN": 0, "FP8_MIN": -448.0, "FP8_MAX": 448.0,
    }  # fmt: skip
    return _peer(
        _PREFIX, "_fwd_kernel", ("attention", "attention prefill", _heads(model, "bf16")), types, constants, stages=1,
        flops=4 * 128 * 64 * model.head_dim, has_dot=True, unaligned=("stride_b_loc_b",), note=" of prefix_prefill",
    )  # fmt: skip


def _cache_write(kv: str) -> Peer:
    """Writes keys and values only: the rotation is another kernel's."""
    model, width = LLAMA, LLAMA.kv_heads * LLAMA.head_dim
    ours = ("rope", "rope_write", _heads(model, "as_is" if kv == "bf16" else kv))
    if kv == "bf16":
        strides = (
            "key_stride", "value_stride", "block_stride", "head_stride", "dim_stride_k", "dim_stride_v", "page_stride",
        )  # fmt: skip
        types = {
            **dict.fromkeys(("key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr"), "*bf16"),
            "slot_mapping_ptr": "*i64", "k_scale": "*fp32", "v_scale": "*fp32", **dict.fromkeys(strides, "i64"),
        }  # fmt: skip
        constants = {
            "num_heads": model.kv_heads, "head_size": model.head_dim, "block_size": 16, "x": 1,
            "USE_HEAD_MAJOR_LAYOUT": False, "FP8_KV_CACHE": False,
        }  # fmt: skip
        return _peer(
            _CACHE, "reshape_and_cache_kernel_flash", ours, types,
            lambda arch: constants | {"TILE_SIZE": min(width, 512 if arch < 90 else 2048)}, warps=16, stages=10,
        )  # fmt: skip
    strides = tuple(
        f"stride_{name}" for name in (
            "key_tok", "key_head", "val_tok", "val_head", "kc_blk", "kc_slot", "kc_head", "vc_blk", "vc_slot",
            "vc_head", "ks_blk", "ks_slot", "vs_blk", "vs_slot",
        )
    )  # fmt: skip
    types = {
        **dict.fromkeys(("key_ptr", "value_ptr"), "*bf16"),
        **dict.fromkeys(("key_cache_ptr", "value_cache_ptr"), _KV[kv][0]),
        **dict.fromkeys(("k_scale_cache_ptr", "v_scale_cache_ptr"), "*fp32"), "slot_mapping_ptr": "*i64",
        **dict.fromkeys(strides, "i64"),
    }  # fmt: skip
    limits = (127.0, -128.0) if kv == "int8" else (448.0, -448.0)
    constants = {
        "stride_ks_head": 1, "stride_vs_head": 1, "block_size": 16, "head_size": model.head_dim,
        "head_size_v": model.head_dim, "HEAD_SIZE_PADDED": model.head_dim, "QUANT_MAX": limits[0],
        "QUANT_MIN": limits[1],
    }  # fmt: skip
    return _peer(
        _CACHE, "_reshape_cache_per_token_head", ours, types, constants, warps=model.head_dim // 32,
        unaligned=("stride_ks_slot", "stride_vs_slot"),
    )  # fmt: skip


_GEMM_SHAPE = "64 x 128 x 64 bf16, every layer of every model"


def _gemms() -> tuple[Peer, ...]:
    """x [M, K] and a weight [N, K], read through its transpose."""
    types = {
        **dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "*bf16"),
        **dict.fromkeys(("M", "N", "K", "stride_am", "stride_bn", "stride_cm"), "i32"),
    }  # fmt: skip
    tile = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 8, "NUM_SMS": SMS}
    ones = {"stride_ak": 1, "stride_bk": 1, "stride_cn": 1}
    ours = ("gemm", "gemm", _GEMM_SHAPE)
    flops = 2 * 128 * 128 * 64
    return (
        _peer(
            _INVARIANT, "matmul_kernel_persistent", ours, types,
            {**tile, **ones, "bias_ptr": None, "A_LARGE": False, "B_LARGE": False, "C_LARGE": False, "HAS_BIAS": False},
            unaligned=("M",), warps=8, flops=flops, has_dot=True,
        ),
        _peer(
            f"{_FI}.sm_constraint_gemm", "gemm_kernel_persistent", ours, {**types, "alpha": "fp32", "beta": "fp32"},
            {**tile, **ones}, unaligned=("M",), flops=flops, has_dot=True,
        ),
    )  # fmt: skip


def _norms(model: ModelShape) -> tuple[Peer, ...]:
    shape = f"{model.name} rows of {model.hidden} bf16"
    block = 1 << (model.hidden - 1).bit_length()
    types = {
        "n": "i32", "b": "i32", "x_ptr": "*bf16", "x_stride": "i32", "w_ptr": "*bf16", "o_ptr": "*bf16",
        "o_stride": "i32", "r_stride": "i32",
    }  # fmt: skip
    constants = {
        "x_scale_ptr": None, "o_scale_ptr": None, "EPS": 1e-5, "BLOCK_SIZE": block, "HAS_IN_SCALE": False,
        "HAS_OUT_SCALE": False, "HAS_OUTPUT": True,
    }  # fmt: skip
    norm = f"{_FI}.norm"
    return (
        _peer(
            _INVARIANT, "_rms_norm_kernel", ("rms_norm", "rms_norm", shape),
            {
                "input_ptr": "*bf16", "weight_ptr": "*bf16", "output_ptr": "*bf16", "input_row_stride": "i32",
                "output_row_stride": "i32", "n_cols": "i32", "eps": "fp32",
            },
            {"BLOCK_SIZE": 1024},
        ),
        _peer(
            norm, "rms_norm_kernel", ("rms_norm", "rms_norm", shape), types,
            {**constants, "r_ptr": None, "HAS_RESIDUAL": False}, unaligned=("b",),
            warps=max(8, min(32, block // 256)),
        ),
        _peer(
            norm, "rms_norm_kernel", ("rms_norm", "add_rms_norm", shape), {**types, "r_ptr": "*bf16"},
            {**constants, "HAS_RESIDUAL": True}, unaligned=("b",), warps=min(32, -(-block // 32)), note=", residual",
        ),
    )  # fmt: skip


def _silu(model: ModelShape) -> Peer:
    return _peer(
        f"{_FI}.activation", "silu_and_mul_kernel",
        ("activation", "silu_mul", f"{model.name} rows of 2 x {model.ffn} bf16"),
        {"o_ptr": "*bf16", "o_stride": "i32", "x_ptr": "*bf16", "x_stride": "i32", "d": "i32"},
        {"o_scale_ptr": None, "x_scale_ptr": None, "BLOCK_SIZE": 1024, "HAS_X_SCALE": False, "HAS_O_SCALE": False},
    )  # fmt: skip


def _merge_states() -> Peer:
    types = {
        "v_ptr": "*fp32", "s_ptr": "*fp32", "v_merged_ptr": "*fp32", "s_merged_ptr": "*fp32", "num_index_sets": "i32",
        "num_heads": "i32", "head_dim": "i32",
    }  # fmt: skip
    ours = ("attention", "attention combine", "Llama-8B 32/8 heads of 128")
    return _peer(f"{_FI}.cascade", "merge_states_kernel", ours, types, {"bdx": LLAMA.head_dim, "bdy": LLAMA.heads})


def _samplers() -> tuple[Peer, ...]:
    """Theirs write masked logits back and draw in further kernels; ours count, select and draw in five."""
    shape = "V49152 V128256 V151936 fp32"
    row = {"logits_ptr": "*fp32", "logits_stride": "i32", "expanded_idx_mapping_ptr": "*i32"}
    return (
        _peer(
            _MIN_P, "_min_p_kernel", ("sampling", "weigh", shape),
            {**row, "min_p_ptr": "*fp32", "vocab_size": "i32"}, {"BLOCK_SIZE": 1024},
        ),
        _peer(
            _TOP, "_topk_topp_kernel", ("sampling", "compact", shape),
            {
                "LOGITS": "*fp32", "BUFFER": "*fp32", "PERCENTILE_TO_STD_TABLE": "*fp32",
                "NORMAL_CDF_TO_SIGMA_TABLE": "*fp32", "K": "*i32", "P": "*fp32", "BATCH_SIZE": "i32",
            },
            {
                "VOCAB_SIZE": LLAMA.vocab, "MASK_VALUE": float("-inf"), "BLOCK_SIZE": 8192, "BLOCK_SIZE_TRUNC": 4096,
                "TOPK_ENABLED": True, "TOPP_ENABLED": True,
            },
        ),
        _peer(
            _GUMBEL, "_gumbel_sample_kernel", ("sampling", "weigh-gumbel", "V49152 V128256 V151936 bf16"),
            {
                **row, "local_argmax_ptr": "*i64", "local_argmax_stride": "i32", "local_max_ptr": "*fp32",
                "local_max_stride": "i32", "processed_logits_stride": "i32", "seeds_ptr": "*i64", "pos_ptr": "*i64",
                "temp_ptr": "*fp32", "vocab_size": "i32",
            },
            {"processed_logits_ptr": None, "BLOCK_SIZE": 1024, "APPLY_TEMPERATURE": True},
            unaligned=("local_argmax_stride", "local_max_stride"),
        ),
    )  # fmt: skip


PEERS = (
    *(_unified(model, "bf16", decode=False) for model in SHIPPED),
    _prefix_prefill(LLAMA),
    *(_unified(LLAMA, kv, decode=False) for kv in ("int8", "fp8")),
    *(_unified(model, "bf16", decode=True) for model in SHIPPED),
    _grouped_decode(LLAMA),
    *(_unified(LLAMA, kv, decode=True) for kv in ("int8", "fp8")),
    _reduce_segments(), _decode_stage2(), _merge_states(),
    *_gemms(),
    *(_cache_write(kv) for kv in ("bf16", "int8", "fp8")),
    *_norms(LLAMA), _silu(LLAMA), *_samplers(),
)  # fmt: skip
