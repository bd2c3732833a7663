"""The structures of csrc/cuda/abi.h, as ctypes sees them; what each field means is said there. Imports no torch.

`__slots__`: a field that a structure lacks is an error, where ctypes alone would keep it as an attribute.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

Fields = list[tuple[str, type]]


def _fields(text: str) -> Fields:
    """Names by the letter of their type: `p: a b; q: c; i: d; f: e` for pointers, int64, int32 and float."""
    types = {"p": c_void_p, "q": c_int64, "i": c_int32, "f": c_float}
    return [
        (name, types[letter.strip()])
        for letter, names in (part.split(":") for part in text.split(";"))
        for name in names.split()
    ]


class Router(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "p: logits_TE bias_E; q: num_tokens num_experts top_k num_groups top_k_groups;"
        "i: sigmoid renormalize group_top2; f: scale; p: weights_TK ids_TK"
    )


class Remap(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "p: topk_ids_N; q: num_pairs num_experts; p: begin_E1 ends_P slots_P slot_ids_N fault work",
    )


class Dispatch(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "p: slot_ids_TK slot_of_E; q: num_tokens top_k num_ranks slots_per_rank;"
        "p: rows_begin_R1 pairs_begin_R1 row_tokens_M pairs_N2 pair_index_TK rows_TK work"
    )


class Group(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "p: pairs_N2 rows_begin_R1 pairs_begin_R1; q: num_ranks max_pairs first_slot num_slots;"
        "p: begin_S1 x_rows_N y_rows_N fault work"
    )


class LocalGroup(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "p: topk_ids_TK slot_of_E; q: num_tokens top_k num_slots; p: begin_S1 x_rows_N y_rows_N fault work"
    )


class Rows(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("p: x out index_M out_rows_TK num_now; q: max_rows hidden top_k; i: x_kind out_kind")


class Combine(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("p: rows_ND pair_index_TK weights_TK out_TD; q: num_tokens top_k hidden; i: dtype")


class Slots(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "p: topk_ids_TK; q: num_tokens top_k num_experts slots_per_rank;"
        "p: num_tokens_now slot_of_E versions_T variant_slots_NE slot_ids_TK"
    )


class Peer(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "p: regions_R; q: num_ranks rank max_tokens top_k hidden row_bytes; p: sequence done_R fault_R1 abort;"
        "q: timeout_ns; p: x_TD rows_M row_tokens_M rows_begin_R1 pairs_N2 pairs_begin_R1 from_begin_R1 pairs_to_N2"
        " pairs_to_R1 y_ND pair_index_TK weights_TK out_TD; q: num_tokens"
    )


class Gemm(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "p: x w w_S bias_N y begin_S1 x_rows y_rows; q: max_rows num_out num_k num_slots expected_rows;"
        "f: scale; i: x_dtype w_dtype y_dtype epilogue x_parts family tile"
    )


class Norm(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields("p: x_TD branch_TD weight_D out_TD; q: num_tokens hidden; f: multiplier eps; i: out_dtype")


class Qkv(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "p: qkv_TX q_weight k_weight positions_T slots_T cos_PC2 sin_PC2 k_cache v_cache q_THC;"
        "q: num_tokens num_heads num_kv_heads head_size block_size q_size k_size; f: eps clip"
    )


class Attention(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "p: q_THC k_cache v_cache block_tables_QB seq_ids_T positions_T sinks_H tiles_N2 alone_N out_THC work done;"
        "q: num_tiles num_alone num_heads num_kv_heads head_size block_size table_width max_positions sliding_window;"
        "f: scale; i: out_dtype"
    )


class Sample(ctypes.Structure):
    __slots__ = ()
    _fields_ = _fields(
        "p: logits_BV; q: batch vocab_size;p: temperature_B top_p_B min_p_B top_k_B seeds_B positions_B token_ids_B"
    )


STRUCTURES: dict[str, type[ctypes.Structure]] = {  # by their name in abi.h
    "sg_cuda_router": Router,
    "sg_cuda_remap": Remap,
    "sg_cuda_dispatch": Dispatch,
    "sg_cuda_group": Group,
    "sg_cuda_local_group": LocalGroup,
    "sg_cuda_rows": Rows,
    "sg_cuda_combine": Combine,
    "sg_cuda_slots": Slots,
    "sg_cuda_peer": Peer,
    "sg_cuda_gemm": Gemm,
    "sg_cuda_norm": Norm,
    "sg_cuda_qkv": Qkv,
    "sg_cuda_attention": Attention,
    "sg_cuda_sample": Sample,
}
