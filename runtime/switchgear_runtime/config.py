"""The settings of one rank's engine: `EngineConfig`.

The one config path: a field here, with its `help`, is the CLI flag (`max_num_seqs` -> `--max-num-seqs`), the keyword of
`LLM(...)` and the row in docs/CONFIG.md. Names follow vLLM's where the meaning is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from switchgear_runtime.errors import ConfigError
from switchgear_runtime.weight_format import DEVICE_QUANTIZATIONS, QUANTIZATIONS, check_quantization


def setting(default: Any, help: str, *, choices: tuple[str, ...] | None = None, default_text: str = "") -> Any:
    """A dataclass field with what the CLI and the docs say of it. `default_text`: where it hangs on other fields."""
    return field(default=default, metadata={"help": help, "choices": choices, "default_text": default_text})


DTYPES = ("auto", "bfloat16", "float32")
CHOICES = ("static", "hash", "waterfill", "lp")  # of replicas; as moe.quotas has them
DEVICES = ("cpu", "cuda", "twin")
TRANSPORTS = ("auto", "shm", "gloo", "nccl", "mpi", "loopback")
GEMM_FAMILIES = ("auto", "mma", "wgmma")
LIBRARY_DISPATCHES = ("deepep", "nccl-ep")
MAX_NUM_SEQS, MAX_NUM_SEQS_GPU = 64, 256  # where nothing is given; as many as small steps have room for
# By data sheets a step of Qwen3-30B-A3B on an H200 takes longer for its FLOPs than for reading all experts from 1,000 tokens on.
MAX_NUM_BATCHED_TOKENS, MAX_NUM_BATCHED_TOKENS_GPU = 512, 4096
DISPATCHES = ("auto", "flat", "hierarchical", *LIBRARY_DISPATCHES)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What every rank of a cluster agrees on. Raises ConfigError where a value cannot work."""

    model: str = setting("", "Directory of a Hugging Face checkpoint. Empty: the bundled model.")
    device: str = setting(
        "cpu",
        "Where ranks compute: cpu; cuda: an NVIDIA GPU each (rank r takes the host's GPU r modulo their number); twin: the "
        "GPU path's own kernels as compiled for the CPU, slow, for tests.",
        choices=DEVICES,
    )
    dtype: str = setting("auto", "Weights and KV cache; auto: the checkpoint's own.", choices=DTYPES)
    quantization: str = setting(
        "none",
        "Weights of experts, dense layers and logits, made at load from bfloat16: int8 (a scale per output) or int4 "
        "(a codebook, a scale per 32 inputs), of the CPU; fp8 (e4m3, a scale per 128 x 128; not the logits'), of GPUs. "
        "Routers and norms keep their precision.",
        choices=QUANTIZATIONS,
    )
    max_model_len: int | None = setting(None, "Most tokens of prompt and output. Default: the model's limit.")
    block_size: int = setting(16, "Tokens per KV-cache block.")
    kv_cache_memory_bytes: int | None = setting(
        None, "KV-cache bytes per rank. Default: 256 MiB; on a GPU what --gpu-memory-utilization leaves."
    )
    num_kv_blocks: int | None = setting(None, "KV-cache blocks per rank; overrides --kv-cache-memory-bytes.")
    gpu_memory_utilization: float | None = setting(
        None,
        "With device cuda, the part of its GPU's memory that a rank may use in all: what weights and steps leave of it is the "
        "KV cache, unless that is given. Default: 0.9, of which ranks that share a GPU get equal parts (launcher local, or "
        "ray with --ray-gpus-per-rank below 1; others: give it).",
    )
    max_num_seqs: int = setting(
        None,
        "Most sequences a rank runs at once; where it is not given, no more than a step's tokens.",
        default_text=f"{MAX_NUM_SEQS}; with device cuda and our own dispatch {MAX_NUM_SEQS_GPU}",
    )
    max_num_batched_tokens: int = setting(
        None,
        "Most tokens a rank computes in one step.",
        default_text=f"{MAX_NUM_BATCHED_TOKENS}; with device cuda and our own dispatch {MAX_NUM_BATCHED_TOKENS_GPU}",
    )
    enable_prefix_caching: bool = setting(True, "Reuse KV blocks of equal prompt prefixes.")
    enable_chunked_prefill: bool = setting(True, "Split long prompts over several steps.")
    transport: str = setting(
        "auto",
        "How ranks exchange tokens; auto: shm, and gloo between hosts; with device cuda, nccl beside them where each rank "
        "has a GPU of its own.",
        choices=TRANSPORTS,
    )
    dispatch: str = setting(
        "auto",
        "With device cuda or twin, how rows reach experts: flat, straight to each rank; hierarchical, once to each domain (a "
        "host, or what shares a --ray-domain-label) and forwarded inside; auto, hierarchical where ranks are in several "
        "domains; deepep or nccl-ep, by that library, if it is installed (cuda only).",
        choices=DISPATCHES,
    )
    trusted_network: bool = setting(
        False, "Only this cluster reaches the network between its hosts; gloo sends in the clear."
    )
    replica_choice: str = setting(
        "lp",
        "How a step spreads tokens over an expert's replicas: static, by hash of the token's place, or by the counts of "
        "this very batch on all ranks (waterfill, lp: the best split).",
        choices=CHOICES,
    )
    lending: int = setting(
        2,
        "Most experts of other ranks that a rank with slack computes with in a layer and step, reading their weights in "
        "place; on one host, with replica_choice waterfill or lp.",
    )
    lent_expert_rows: int | None = setting(
        None,
        "What a lent expert costs in a step's balance, in rows of an expert that take as long as reading its weights where "
        "they lie. Default: as of an own expert on the CPU; on a GPU 2200, FLOPs by NVLink's bytes a second.",
    )
    step_timeout_s: float = setting(10.0, "Deadline of one wait for the other ranks, in seconds.")
    weight_cache_dir: str | None = setting(
        None,
        "Where packed weights are kept for the next start and shared by the ranks of a host; empty: nowhere. "
        "Default: switchgear/weights in the user's cache folder.",
    )
    survive: int = setting(
        1, "Size a rank's slot pool so that after so many deaths the other ranks can hold every expert."
    )
    forced_routing: str | None = setting(
        None,
        "An experiment: file of `switchgear record` that draws each token's experts in place of the router, by the "
        "request's seed and the token's position. The text becomes nonsense. Needs --no-enable-prefix-caching.",
    )
    routing_log: str | None = setting(
        None,
        "An experiment: folder in which each rank writes the experts of every token, as `switchgear record --tokens` "
        "does. Steps then run op by op, slower.",
    )
    dispatch_dtype: str = setting(
        "auto",
        "On a device: how rows travel to their experts, also those that stay on their rank; auto: bfloat16; fp8 or int8: "
        "half the bytes, with a scale per 128 values. Results come back as bfloat16.",
        choices=("auto", "fp8", "int8"),
    )
    gemm_family: str = setting(
        "auto",
        "On a device: tensor-core instructions that multiply bfloat16: mma, of every GPU; wgmma, of Hopper (sm_90); "
        "auto: wgmma where a check at start finds its numbers right, else mma. All ranks need the same. Should wgmma hang or "
        "fault: mma.",
        choices=GEMM_FAMILIES,
    )
    small_step_tokens: int = setting(
        256,
        "On a device: steps in which no rank has more tokens run without the host, in exchanges through peer memory and "
        "as CUDA graphs; 0: none do.",
    )
    enforce_eager: bool = setting(False, "On a device: no CUDA graphs; small steps are launched one kernel at a time.")
    async_scheduling: bool = setting(
        True, "On a device: schedule a step while the one before runs; its tokens are given a step later."
    )
    num_threads: int = setting(1, "Compute threads per rank.")
    bind_cpus: bool = setting(
        True, "Give each rank CPUs of its own, where the host has enough free ones for all ranks' threads."
    )

    def __post_init__(self) -> None:
        self._settle_sizes()
        for name, choices in ((f.name, f.metadata.get("choices")) for f in fields(self)):
            value = getattr(self, name)
            if choices and value not in choices:
                raise ConfigError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
        for name in ("block_size", "num_threads"):
            _positive(name, getattr(self, name))
        for name in ("max_model_len", "num_kv_blocks", "kv_cache_memory_bytes"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if not isinstance(self.survive, int) or self.survive < 0:
            raise ConfigError(f"survive={self.survive!r} must be a number of ranks, 0 or more")
        if self.small_step_tokens < 0:
            raise ConfigError(f"small_step_tokens={self.small_step_tokens} must not be negative; 0: no small steps")
        if self.lending < 0:
            raise ConfigError(f"lending={self.lending} must not be negative; 0 lends nothing")
        if self.lent_expert_rows is not None and self.lent_expert_rows < 0:
            raise ConfigError(f"lent_expert_rows={self.lent_expert_rows} must not be negative; 0: reads cost nothing")
        if self.dtype == "float32":
            check_quantization(self.dtype, self.quantization)  # "auto" is settled when the checkpoint is known
        self._check_device()
        self._check_dispatch()
        if self.forced_routing is not None and self.enable_prefix_caching:
            raise ConfigError(
                f"forced_routing={self.forced_routing!r} needs enable_prefix_caching=False: cached tokens were routed "
                "by another request's seed"
            )
        if self.step_timeout_s < 1.0:
            raise ConfigError(f"step_timeout_s={self.step_timeout_s} is below 1; a busy host needs at least a second")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}; "
                "raise it, or lower max_num_seqs, so that every running sequence can take a token each step"
            )

    def _settle_sizes(self) -> None:
        """Those that nobody gave, as this device has them."""
        # What the libraries dispatch through has room for every pair of a step in every slot.
        is_gpu = self.device == "cuda" and self.dispatch not in LIBRARY_DISPATCHES
        given = {name: getattr(self, name) for name in ("max_num_batched_tokens", "max_num_seqs")}
        for name, value in given.items():
            if value is not None:
                _positive(name, value)
        tokens, seqs = given.values()
        if tokens is None:
            tokens = max(MAX_NUM_BATCHED_TOKENS_GPU if is_gpu else MAX_NUM_BATCHED_TOKENS, seqs or 0)
        if seqs is None:
            seqs = min(MAX_NUM_SEQS_GPU if is_gpu else MAX_NUM_SEQS, tokens)
        object.__setattr__(self, "max_num_batched_tokens", tokens)
        object.__setattr__(self, "max_num_seqs", seqs)

    def _check_device(self) -> None:
        part = self.gpu_memory_utilization
        if part is not None:
            if self.device != "cuda":
                raise ConfigError(
                    f"gpu_memory_utilization={part!r} needs device='cuda', not {self.device!r}; leave it out"
                )
            if isinstance(part, bool) or not isinstance(part, int | float) or not 0 < part <= 1:
                raise ConfigError(
                    f"gpu_memory_utilization={part!r} must be above 0 and at most 1: a part of the GPU's memory"
                )
        if self.transport == "nccl" and self.device != "cuda":
            raise ConfigError(f"transport='nccl' moves GPU memory and device={self.device!r}; use device='cuda'")
        if self.device == "cpu":
            if self.gemm_family != "auto":
                raise ConfigError(
                    f"gemm_family={self.gemm_family!r} is of devices, and device='cpu'; leave it out, or use device='cuda'"
                )
            if self.quantization == "fp8":
                raise ConfigError(
                    "quantization='fp8' needs device='cuda': CPUs have no product of such values; give int8 or int4 here"
                )
            return
        if self.quantization not in DEVICE_QUANTIZATIONS:
            raise ConfigError(
                f"quantization={self.quantization!r} is for device='cpu' only; with device={self.device!r} give "
                f"{' or '.join(DEVICE_QUANTIZATIONS)}"
            )
        if self.routing_log is not None:
            raise ConfigError(
                f"routing_log={self.routing_log!r} is for device='cpu' only so far; leave it out with "
                f"device={self.device!r}"
            )
        if self.dtype == "float32":
            raise ConfigError(f"dtype='float32' with device={self.device!r}: its products take bfloat16; use that")

    def _check_dispatch(self) -> None:
        if self.dispatch_dtype != "auto" and (self.device == "cpu" or self.dispatch in LIBRARY_DISPATCHES):
            raise ConfigError(
                f"dispatch_dtype={self.dispatch_dtype!r} is for devices and our own dispatch, not for device={self.device!r} "
                f"with dispatch={self.dispatch!r}; use dispatch_dtype='auto'"
            )
        devices = ("cuda",) if self.dispatch in LIBRARY_DISPATCHES else ("cuda", "twin")
        if self.dispatch != "auto" and self.device not in devices:
            raise ConfigError(
                f"dispatch={self.dispatch!r} needs device={' or '.join(devices)}, not {self.device!r}; use dispatch='auto'"
            )


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a positive integer")
