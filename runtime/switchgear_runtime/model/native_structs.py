"""The structures of csrc/model/decoder.h, as ctypes sees them, and the functions that take them. Imports no torch."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_int64, c_void_p

from switchgear_runtime import native

EXCHANGE_FAILED = 2


class Weight(ctypes.Structure):
    _fields_ = [
        ("packed", c_void_p),
        ("bias_N", c_void_p),
        ("num_out", c_int64),
        ("num_k", c_int64),
        ("format", c_int32),
        ("gate_up", c_int32),
    ]


class AttentionSpec(ctypes.Structure):
    _fields_ = [
        ("qkv", Weight),
        ("out", Weight),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("q_norm_size", c_int64),
        ("k_norm_size", c_int64),
        ("cos_PC2", c_void_p),
        ("sin_PC2", c_void_p),
        ("num_positions", c_int64),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_size", c_int64),
        ("sliding_window", c_int64),
        ("scale", c_float),
        ("clip_qkv", c_float),
    ]


class Mlp(ctypes.Structure):
    _fields_ = [("gate_up", Weight), ("down", Weight)]


class Moe(ctypes.Structure):
    _fields_ = [
        ("router", Weight),
        ("index", c_int64),
        ("top_k", c_int64),
        ("ffn", c_int64),
        ("sigmoid", c_int32),
        ("renormalize", c_int32),
        ("format", c_int32),
        ("has_shared_gate", c_int32),
        ("shared", Mlp),
        ("shared_gate", Weight),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("attention", AttentionSpec),
        ("mlp", Mlp),
        ("moe", Moe),
    ]


class DecoderSpec(ctypes.Structure):
    _fields_ = [
        ("num_layers", c_int64),
        ("num_moe_layers", c_int64),
        ("num_experts", c_int64),
        ("hidden", c_int64),
        ("vocab_size", c_int64),
        ("layers", POINTER(Layer)),
        ("embedding_VD", c_void_p),
        ("embedding_dtype", c_int32),
        ("cache_dtype", c_int32),
        ("post_norm", c_int32),
        ("norm_eps", c_float),
        ("residual_multiplier", c_float),
        ("embedding_multiplier", c_float),
        ("logits_scaling", c_float),
        ("final_norm", c_void_p),
        ("lm_head", Weight),
        ("num_blocks", c_int64),
        ("block_size", c_int64),
    ]


class Placement(ctypes.Structure):
    _fields_ = [
        ("w13_packed_S", c_void_p),
        ("w2_packed_S", c_void_p),
        ("experts_S", c_void_p),
        ("slot_table_E", c_void_p),
        ("slots_per_rank", c_int64),
        ("first_slot", c_int64),
        ("quotas", c_void_p),
        ("variants_NE", c_void_p),
        ("num_versions", c_int64),
    ]


class Buffer(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("size", c_int64)]


ExchangeFunction = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(Buffer), POINTER(Buffer))


# The parts of a step that its clock tells apart (csrc/model/decoder.h).
PHASES = (
    "embedding",
    "attention products",
    "attention",
    "router",
    "load recording",
    "replicas",
    "dispatch",
    "experts",
    "combine",
    "dense ffn",
    "logits",
)


class Step(ctypes.Structure):
    _fields_ = [
        ("token_ids_T", c_void_p),
        ("positions_T", c_void_p),
        ("seq_ids_T", c_void_p),
        ("slots_T", c_void_p),
        ("block_tables_SB", c_void_p),
        ("num_tokens", c_int64),
        ("num_seqs", c_int64),
        ("table_width", c_int64),
        ("num_ranks", c_int64),
        ("rank", c_int64),
        ("exchanger", c_void_p),
        ("timeout_s", c_double),
        ("exchange", ExchangeFunction),
        ("exchange_context", c_void_p),
        ("routed_NLE", c_void_p),
        ("rows_LE", c_void_p),
        ("x_TD", c_void_p),
        ("phase_ns", c_void_p),
        ("tenants_S", c_void_p),
        ("forced_ids_LTK", c_void_p),
        ("balance", c_int32),
        ("versions_S", c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The core library, with the signatures of the decoder's functions set."""
    core = native.core()
    core.sg_decoder_create.argtypes = [POINTER(DecoderSpec)]
    core.sg_decoder_create.restype = c_void_p
    core.sg_decoder_free.argtypes = [c_void_p]
    core.sg_decoder_free.restype = None
    core.sg_decoder_place.argtypes = [c_void_p, c_int64, POINTER(Placement)]
    core.sg_decoder_step.argtypes = [c_void_p, POINTER(Step)]
    core.sg_decoder_logits.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p]
    return core
