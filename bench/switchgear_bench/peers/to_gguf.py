"""A checkpoint as GGUF files for llama.cpp: `python to_gguf.py LLAMA_CPP_SOURCE BINARIES MODEL_DIR OUT_DIR`.

Runs in an environment with torch, transformers and sentencepiece. llama.cpp's converter writes bf16, its llama-quantize
the rest. The converter refuses a tokenizer it has not met; here it takes any as GPT-2's kind of byte-level BPE, for prompts
are token ids and no text is ever split. Beside each file goes FILE.json, the bytes of its tensors by role.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

QUANTISED = {"q8_0": "Q8_0", "q4_k_m": "Q4_K_M"}
_TIMEOUT_S = 1800


def convert(source: str, model: str, out_file: Path) -> None:
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda _self, _tokenizer: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", "--outtype", "bf16", "--outfile", str(out_file), model]
    try:
        runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise


def tensor_bytes(path: Path) -> dict[str, int]:
    """Of what a decode step reads whole (`dense`, lm_head included), in part (`experts`) and by row (`embedding`)."""
    from gguf import GGUFReader

    sizes = {"dense": 0, "experts": 0, "embedding": 0}
    for tensor in GGUFReader(str(path)).tensors:
        role = "experts" if "_exps" in tensor.name else "embedding" if tensor.name == "token_embd.weight" else "dense"
        sizes[role] += int(tensor.n_bytes)
    return sizes


def main() -> None:
    source, binaries, model, out_dir = sys.argv[1:5]
    sys.path[:0] = [source, f"{source}/gguf-py"]
    bf16 = Path(out_dir) / "bf16.gguf"
    if not bf16.exists():
        convert(source, model, bf16.with_suffix(".part"))
        bf16.with_suffix(".part").rename(bf16)
    for name, kind in QUANTISED.items():
        path = Path(out_dir) / f"{name}.gguf"
        if not path.exists():
            part = path.with_suffix(".part")
            subprocess.run([f"{binaries}/llama-quantize", str(bf16), str(part), kind], check=True, timeout=_TIMEOUT_S)
            part.rename(path)
    for name in ("bf16", *QUANTISED):
        path = Path(out_dir) / f"{name}.gguf"
        path.with_name(path.name + ".json").write_text(json.dumps(tensor_bytes(path)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
