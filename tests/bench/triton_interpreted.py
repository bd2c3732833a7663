"""The Triton peer against plain fp32, through Triton's interpreter, which must be switched on before Triton is imported.

Run with TRITON_INTERPRET=1 by test_triton_moe.py. fp32 all through: the interpreter multiplies bf16 as the integers they
are stored in.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from triton.runtime import interpreter

from switchgear_bench import triton_moe
from switchgear_bench.gpu_layer import UNIFORM, ZIPF, Layer, Routing, Shape
from switchgear_bench.gpu_moe import plain
from switchgear_bench.triton_moe import Config, TritonMoe

CONFIGS = [Config(16, 32, 32, 1, 4, 2), Config(16, 64, 64, 16, 4, 2), Config(32, 16, 16, 2, 4, 2)]
CPU = torch.device("cpu")


def let_numbers_be_indices() -> None:
    """It takes int() of an array of one number, which newer numpys refuse."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def main(seed: int) -> None:
    let_numbers_be_indices()
    rng = random.Random(seed)
    shape = Shape("small", 8, 2, 8 * rng.randint(2, 12), 8 * rng.randint(2, 9))
    drawn = Layer.random(shape, CPU)
    layer = Layer(shape, drawn.w13_EXD.float(), drawn.w2_EDF.float(), drawn.router_ED)
    moe = TritonMoe(layer)
    moe._router_ED = layer.router_ED
    triton_moe._CHUNK = 64  # so that few tokens are planned by two launches, too
    for num_tokens in (1, rng.randint(2, 9), rng.randint(33, 60)):
        routing = Routing.draw(shape, num_tokens, rng.choice([UNIFORM, ZIPF]), seed, CPU)
        routing = Routing(routing.h_TD, routing.h_TD, routing.ids_TK, routing.weights_TK)
        moe.config = rng.choice(CONFIGS)
        where = f"seed {seed}, {num_tokens} tokens, {moe.config}"
        expected = plain(layer, routing.h_TD, routing.ids_TK, routing.weights_TK)
        assert expected.abs().max() > 0.01, where
        torch.testing.assert_close(moe(routing), expected, rtol=1e-4, atol=1e-5, msg=where)
        chances_TE = (routing.h_TD @ layer.router_ED.T).softmax(-1)
        weights_TK, ids_TK = chances_TE.topk(shape.top_k, -1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        expected = plain(layer, routing.h_TD, ids_TK.int(), weights_TK)
        torch.testing.assert_close(moe.routed(routing), expected, rtol=1e-4, atol=1e-5, msg=where)
    print("compared")


if __name__ == "__main__":
    main(int(sys.argv[1]))
