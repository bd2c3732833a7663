"""The device kernels of dense layers and attention on tensors: `DenseKernels`, thin names over csrc/cuda/abi.h.

A call makes its outputs (of torch's memory, or of a step's: `in_memory`) and only enqueues, on a stream of its own.
Everything is contiguous and on one device. Kernels trust shapes, which the decoder knows, so nothing is checked here.
Activations between ops are fp32 where the CPU's are; what a product takes is bf16 (norms and gated products write it at
once).

Letters: T tokens, D hidden, N outputs of a product, K its inputs, M rows, F ffn, H query heads, G KV heads, C head size,
B blocks, Z block size, Q sequences, V vocabulary, P positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from switchgear_runtime.cuda import structs
from switchgear_runtime.cuda.attention_packing import AttentionPacking
from switchgear_runtime.cuda.library import ATTENTION_ROWS, BF16, FP32, WGMMA, Kind, device_library
from switchgear_runtime.cuda.products import DTYPES, ProductKernels, address
from switchgear_runtime.cuda.step_memory import StepMemory

STEP_PRIORITY = -1  # before what is copied beside the steps (SideCopies)


class DenseKernels(ProductKernels):
    """Of one device: `cuda` for a GPU's tensors, `twin` for the host's."""

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self.kind = kind
        self.device = device
        self._library = device_library(kind)
        self._memory: StepMemory | None = None
        # Of its own: what is captured, and what other threads do, must not be on the default one.
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=STEP_PRIORITY)  # type: ignore[no-untyped-call]
        # What kernels found wrong: 1 + an expert over its plan; 1 + a pair that belongs to no slot here.
        self.faults = torch.zeros(2, dtype=torch.int32, device=device)
        self._attention_done = torch.zeros(ATTENTION_ROWS, dtype=torch.int32, device=device)

    def version(self) -> str:
        """Of the kernels' numbers: ranks that differ could compute different bits."""
        version: bytes = self._library.sg_cuda_kernel_version()
        return f"{self.kind} {version.decode()} {'wgmma' if self._library.sg_cuda_gemm_family() == WGMMA else 'mma'}"

    def num_tiles(self, family: int) -> int:
        """Of a family of bf16 products; 0 where the device has none."""
        return int(self._library.sg_cuda_gemm_tiles(family, 1, BF16))

    def use_family(self, family: int) -> None:
        """For all products of this process."""
        self._library.sg_cuda_gemm_use(family)

    def on_stream(self) -> AbstractContextManager[object]:
        """Where kernels are enqueued, torch's own inside: any thread calls the rest in here. On the host nothing."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @contextmanager
    def in_memory(self, memory: StepMemory) -> Iterator[None]:
        """Inside, outputs are taken from a step's memory."""
        before, self._memory = self._memory, memory
        try:
            yield
        finally:
            self._memory = before

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._memory is not None:
            return self._memory.empty(*shape, dtype=dtype)
        return torch.empty(shape, dtype=dtype, device=self.device)

    def copy_(self, to: Tensor, source: Tensor) -> None:
        """As many bytes, between any two memories; from the host's only if that is pinned does nobody wait."""
        assert to.nbytes == source.nbytes
        self.call("copy", to.data_ptr(), source.data_ptr(), to.nbytes)

    def zero_(self, out: Tensor) -> Tensor:
        self.call("zero", out.data_ptr(), out.nbytes)
        return out

    # --- rows ---------------------------------------------------------------------------------------------------------

    def embed(self, embedding_VD: Tensor, token_ids_T: Tensor, multiplier: float) -> Tensor:
        x_TD = self.empty(token_ids_T.shape[0], embedding_VD.shape[1])
        self.call(
            "embed",
            embedding_VD.data_ptr(),
            DTYPES[embedding_VD.dtype],
            token_ids_T.data_ptr(),
            token_ids_T.shape[0],
            embedding_VD.shape[1],
            multiplier,
            x_TD.data_ptr(),
        )
        return x_TD

    def rms_norm(
        self,
        x_TD: Tensor,
        weight_D: Tensor,
        eps: float,
        *,
        dtype: torch.dtype = torch.float32,
        out_TD: Tensor | None = None,
    ) -> Tensor:
        """Into `out_TD` if it is given."""
        return self._norm(x_TD, None, 0.0, weight_D, eps, dtype, out_TD)

    def add_rms_norm(
        self,
        x_TD: Tensor,
        branch_TD: Tensor,
        multiplier: float,
        weight_D: Tensor,
        eps: float,
        *,
        dtype: torch.dtype = torch.float32,
        out_TD: Tensor | None = None,
    ) -> Tensor:
        """x += multiplier * branch, and the norm of that."""
        return self._norm(x_TD, branch_TD, multiplier, weight_D, eps, dtype, out_TD)

    def _norm(
        self,
        x_TD: Tensor,
        branch_TD: Tensor | None,
        multiplier: float,
        weight_D: Tensor,
        eps: float,
        dtype: torch.dtype,
        out_TD: Tensor | None,
    ) -> Tensor:
        if out_TD is None:
            out_TD = self.empty(*x_TD.shape, dtype=dtype)
        args = structs.Norm(
            x_TD=x_TD.data_ptr(),
            branch_TD=address(branch_TD),
            weight_D=weight_D.data_ptr(),
            out_TD=out_TD.data_ptr(),
            num_tokens=x_TD.shape[0],
            hidden=x_TD.shape[1],
            multiplier=multiplier,
            eps=eps,
            out_dtype=DTYPES[out_TD.dtype],
        )
        self.call("rms_norm", args)
        return out_TD

    def rounded(self, x_TD: Tensor, out_TD: Tensor | None = None) -> Tensor:
        """fp32 to bf16."""
        if out_TD is None:
            out_TD = self.empty(*x_TD.shape, dtype=torch.bfloat16)
        return self._rows("pack_rows", x_TD, None, out_TD, FP32, BF16)

    def select_rows(self, x_TD: Tensor, rows_S: Tensor) -> Tensor:
        """[S, D] fp32, by int32."""
        return self._rows("pack_rows", x_TD, rows_S, self.empty(rows_S.shape[0], x_TD.shape[1]), FP32, FP32)

    def add_branch(self, x_TD: Tensor, branch_TD: Tensor, multiplier: float, gate_T: Tensor | None = None) -> None:
        """x += multiplier * (sigmoid(gate) * branch); without a gate, of the branch."""
        self.call(
            "add_branch",
            x_TD.data_ptr(),
            branch_TD.data_ptr(),
            address(gate_T),
            1,
            multiplier,
            x_TD.shape[0],
            x_TD.shape[1],
        )

    # --- attention ----------------------------------------------------------------------------------------------------

    def rotate_qkv(
        self,
        qkv_TX: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        num_heads: int,
        positions_T: Tensor,
        slots_T: Tensor,
        cos_PC2: Tensor,
        sin_PC2: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        clip: float,
    ) -> Tensor:
        """q_THC bf16: q and k normed (where there is a weight: of a head, or of all), clipped (0: not) and rotated; k,
        and v clipped, go into the cache [B, G, Z, C]."""
        _, num_kv_heads, block_size, head_size = k_cache.shape
        q_THC = self.empty(qkv_TX.shape[0], num_heads, head_size, dtype=torch.bfloat16)
        args = structs.Qkv(
            qkv_TX=qkv_TX.data_ptr(),
            q_weight=address(q_weight),
            k_weight=address(k_weight),
            positions_T=positions_T.data_ptr(),
            slots_T=slots_T.data_ptr(),
            cos_PC2=cos_PC2.data_ptr(),
            sin_PC2=sin_PC2.data_ptr(),
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            q_THC=q_THC.data_ptr(),
            num_tokens=qkv_TX.shape[0],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            block_size=block_size,
            q_size=0 if q_weight is None else q_weight.shape[0],
            k_size=0 if k_weight is None else k_weight.shape[0],
            eps=eps,
            clip=clip,
        )
        self.call("rotate_qkv", args)
        return q_THC

    def paged_attention(
        self,
        q_THC: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        block_tables_QB: Tensor,
        seq_ids_T: Tensor,
        positions_T: Tensor,
        packing: AttentionPacking,
        scale: float,
        sliding_window: int,
    ) -> Tensor:
        """[T, H * C] bf16. The packing changes no bit."""
        num_tokens, num_heads, head_size = q_THC.shape
        _, num_kv_heads, block_size, _ = k_cache.shape
        out_TX = self.empty(num_tokens, num_heads * head_size, dtype=torch.bfloat16)
        sizes = (packing.num_alone, num_heads, num_kv_heads, head_size, packing.max_positions)
        work = self.empty(self.size("attention_work", *sizes))
        args = structs.Attention(
            q_THC=q_THC.data_ptr(),
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            block_tables_QB=block_tables_QB.data_ptr(),
            seq_ids_T=seq_ids_T.data_ptr(),
            positions_T=positions_T.data_ptr(),
            tiles_N2=address(packing.tiles_N2),
            alone_N=address(packing.alone_N),
            out_THC=out_TX.data_ptr(),
            work=work.data_ptr(),
            done=self._attention_done.data_ptr(),
            num_tiles=0 if packing.tiles_N2 is None else packing.tiles_N2.shape[0],
            num_alone=packing.num_alone,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            block_size=block_size,
            table_width=block_tables_QB.shape[1],
            max_positions=packing.max_positions,
            sliding_window=sliding_window,
            scale=scale,
            out_dtype=BF16,
        )
        self.call("paged_attention", args)
        return out_TX

    # --- sampling -----------------------------------------------------------------------------------------------------

    def sample(
        self,
        logits_SV: Tensor,
        *,
        temperature_S: Tensor,
        top_p_S: Tensor,
        min_p_S: Tensor,
        top_k_S: Tensor,
        seeds_S: Tensor,
        draws_S: Tensor,
        out_S: Tensor,
    ) -> None:
        """A token id (int64) of each row into `out_S`, by the request's seed and the index of the draw; the meaning of
        ops.sample, without penalties, bias and logprobs."""
        args = structs.Sample(
            logits_BV=logits_SV.data_ptr(),
            batch=logits_SV.shape[0],
            vocab_size=logits_SV.shape[1],
            temperature_B=temperature_S.data_ptr(),
            top_p_B=top_p_S.data_ptr(),
            min_p_B=min_p_S.data_ptr(),
            top_k_B=top_k_S.data_ptr(),
            seeds_B=seeds_S.data_ptr(),
            positions_B=draws_S.data_ptr(),
            token_ids_B=out_S.data_ptr(),
        )
        self.call("sample_rows", args)

    def _rows(
        self,
        name: str,
        x: Tensor,
        index_M: Tensor | None,
        out: Tensor,
        from_kind: int,
        to_kind: int,
        num_now: Tensor | None = None,
    ) -> Tensor:
        args = structs.Rows(
            x=x.data_ptr(),
            out=out.data_ptr(),
            index_M=address(index_M),
            num_now=address(num_now),
            max_rows=out.shape[0],
            hidden=(out if name == "unpack_rows" else x).shape[1],
            x_kind=from_kind,
            out_kind=to_kind,
        )
        self.call(name, args)
        return out

    def size(self, name: str, *args: Any) -> int:
        """A function of the library that only says how much."""
        given = [ctypes.byref(arg) if isinstance(arg, ctypes.Structure) else arg for arg in args]
        return int(getattr(self._library, f"sg_cuda_{name}")(*given))

    def free_graph(self, handle: int | None) -> None:
        self._library.sg_cuda_graph_free(handle)

    def call(self, name: str, *args: Any) -> None:
        """A function of the library that enqueues, by its name without sg_cuda_."""
        given = [ctypes.byref(arg) if isinstance(arg, ctypes.Structure) else arg for arg in args]
        stream = 0 if self._stream is None else self._stream.cuda_stream
        getattr(self._library, f"sg_cuda_{name}")(*given, stream)
