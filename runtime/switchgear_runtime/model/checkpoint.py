"""A Hugging Face checkpoint on disk: validated from its headers alone, then read tensor by tensor.

`Checkpoint(model_dir, spec)` opens every shard's header and checks presence, shape, dtype and length of every tensor
the spec needs, of all experts, before anything is allocated. Reading maps the files, so a rank touches the bytes of
its own experts only (`num_bytes_read` counts them).

dtype "auto" is the checkpoint's own; float16, for which there are no kernels, widens to float32, which is exact. Ask
for bfloat16 to halve that, at bfloat16's precision.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from switchgear_runtime.errors import CheckpointError
from switchgear_runtime.model.config_keys import read_json
from switchgear_runtime.model.names import (
    EMBED,
    LM_HEAD,
    SCALES,
    SHARED_GATE,
    ExpertNames,
    expected_shapes,
    expert_names,
    expert_shapes,
    scales_name,
)
from switchgear_runtime.model.safetensors_file import DTYPES, FP8, SafetensorsFile, TensorEntry
from switchgear_runtime.model.spec import DecoderSpec, load_spec
from switchgear_runtime.weight_format import FP8_BLOCK

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
IDENTITY_BYTES = 4096  # of each tensor
_AUTO = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float32}
_AUTO_ON_DISK = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float32}
_HARMLESS = ("rotary_emb.inv_freq",)  # a constant that old checkpoints carry


class Checkpoint:
    """Where each tensor of a model lies. Opening it allocates nothing; every defect is a CheckpointError naming it."""

    def __init__(self, model_dir: str | Path, spec: DecoderSpec | None = None) -> None:
        self.model_dir = Path(model_dir)
        self.spec = spec if spec is not None else load_spec(self.model_dir)
        self._files = self._open()
        self._shards = sorted(set(self._files.values()), key=lambda file: file.path.name)
        self.names: ExpertNames = expert_names(self.spec, self._files)
        self._validate()

    def _open(self) -> dict[str, SafetensorsFile]:
        """Tensor name -> the file that has it."""
        index = self.model_dir / INDEX
        single = self.model_dir / SINGLE
        if index.exists():
            return self._open_shards(index)
        if not single.exists():
            raise CheckpointError(
                f"{self.model_dir} has neither {SINGLE} nor {INDEX}; only safetensors checkpoints are served"
            )
        file = SafetensorsFile(single)
        return dict.fromkeys(file.entries, file)

    def _open_shards(self, index: Path) -> dict[str, SafetensorsFile]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map is missing or no object")
        shards: dict[str, SafetensorsFile] = {}
        files: dict[str, SafetensorsFile] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: weight_map[{name!r}]={shard!r} is not the name of a safetensors file beside it"
                )
            if shard not in shards:
                if not (self.model_dir / shard).exists():
                    raise CheckpointError(f"{self.model_dir / shard} is missing; {index.name} says it holds {name}")
                shards[shard] = SafetensorsFile(self.model_dir / shard)
            if name not in shards[shard].entries:
                raise CheckpointError(
                    f"tensor {name} is missing from {shards[shard].path}, where {index.name} says it is"
                )
            files[name] = shards[shard]
        return files

    def _validate(self) -> None:
        expected = expected_shapes(self.spec, self.names, self._files)
        dtypes = [dtype for dtype in DTYPES if dtype != FP8]
        for name, shape in list(expected.items()):
            self._check_shape(name, shape)
            if self.entry(name).dtype == FP8:
                expected[self._check_fp8(name)] = ()
            elif self.entry(name).dtype not in dtypes:
                raise CheckpointError(
                    f"{self._files[name].path}: tensor {name} has dtype {self.entry(name).dtype}; expected one of "
                    f"{', '.join(dtypes)}"
                )
        for name in self._files:
            # A bias, an extra layer, a scale that we would not compute with: wrong tokens are worse than none.
            if name not in expected and not name.endswith(_HARMLESS):
                raise CheckpointError(
                    f"tensor {name} in {self._files[name].path} has no place in the model config.json describes"
                )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._files:
            raise CheckpointError(f"tensor {name} is missing from {self.model_dir}")
        if self.entry(name).shape != shape:
            raise CheckpointError(
                f"{self._files[name].path}: tensor {name} has shape {list(self.entry(name).shape)}, config.json implies "
                f"{list(shape)}"
            )

    def _check_fp8(self, name: str) -> str:
        """The name of its scales."""
        path, shape = self._files[name].path, self.entry(name).shape
        if self.spec.quantization != "fp8":
            raise CheckpointError(f"{path}: tensor {name} is fp8, and config.json has no quantization_config")
        kept = (EMBED, LM_HEAD, *map(self.names.router, self.spec.moe_layers))
        if len(shape) != 2 or name in kept or name.endswith(SHARED_GATE):
            raise CheckpointError(
                f"{path}: tensor {name} is fp8; only matrices of attention, of dense layers and of experts, one by one, "
                "are served so"
            )
        scales = scales_name(name)
        self._check_shape(scales, (-(-shape[0] // FP8_BLOCK), -(-shape[1] // FP8_BLOCK)))
        if self.entry(scales).dtype not in ("F32", "BF16"):
            raise CheckpointError(f"{path}: tensor {scales} has dtype {self.entry(scales).dtype}; expected F32 or BF16")
        return scales

    def entry(self, name: str) -> TensorEntry:
        return self._files[name].entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def dtype(self, requested: Literal["auto", "bfloat16", "float32"] | str) -> torch.dtype:
        """What the weights become in memory (see the module's text for "auto")."""
        if requested != "auto":
            return _AUTO[requested]
        if self.spec.dtype is not None:
            return _AUTO[self.spec.dtype]
        return _AUTO_ON_DISK[self.entry(EMBED).dtype]

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file, in the dtype it has on disk."""
        return self._files[name].read(name)

    def is_fp8(self, name: str) -> bool:
        """Whether it has scales."""
        return self.entry(name).dtype == FP8

    def fp8(self, name: str) -> tuple[Tensor, Tensor]:
        """(codes [N, K], fp32 scales [ceil(N / 128), ceil(K / 128)]): a value is code * scale."""
        return self.tensor(name), self.tensor(scales_name(name)).float()

    def expert_gate_up(self, layer: int, expert: int) -> Tensor:
        """Gate and up rows [2F, D] of one logical expert of decoder layer `layer`."""
        gate_name, up_name, _ = self.names.expert(layer, expert)
        if self.names.fused:
            return self._files[gate_name].read(gate_name, expert)
        return torch.cat([self.tensor(gate_name), self.tensor(up_name)])

    def expert_down(self, layer: int, expert: int) -> Tensor:
        """[D, F]."""
        _, _, down_name = self.names.expert(layer, expert)
        return self._files[down_name].read(down_name, expert) if self.names.fused else self.tensor(down_name)

    @property
    def paths(self) -> list[Path]:
        """The files with weights, in the order of their names."""
        return [file.path for file in self._shards]

    @property
    def lm_head(self) -> str:
        """The tensor the logits come from."""
        return LM_HEAD if LM_HEAD in self else EMBED

    @property
    def num_bytes_read(self) -> int:
        return sum(file.num_bytes_read for file in self._shards)

    @property
    def num_tensors_read(self) -> int:
        return sum(file.num_tensors_read for file in self._shards)

    def identity(self) -> str:
        """A digest of every header and of the start of every tensor that all ranks hold: ranks with different
        checkpoints must not join. It tells fine-tunes apart, but not those that differ in experts only."""
        experts = {
            name
            for layer in self.spec.moe_layers
            for name in expert_shapes(self.names, self.spec.moe, self.spec.hidden_size, layer)
        }
        digest = hashlib.sha256()
        for file in self._shards:
            digest.update(f"{file.path.name} {file.num_bytes}\n".encode())
            digest.update(file.header_text)
            for name in sorted(file.entries):
                if name.removesuffix(SCALES) not in experts:
                    digest.update(file.head(name, IDENTITY_BYTES))
        return digest.hexdigest()[:16]

    def release(self) -> None:
        """Unmap the files after loading; a later read (a migrated expert) maps again."""
        for file in self._shards:
            file.release()
