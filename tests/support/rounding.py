"""How near two computations of one value come, and greedy tokens that no rounding chooses.

The same sums in another order (another batch, other strides, with or without a cache, compiled, on another processor)
differ by rounding. Each layer adds to the residual stream two blocks of a few operations, each of them good to a few
units in the last place of the largest value; the head is one more.
"""

from __future__ import annotations

from typing import Any

import torch

LAYERS = 3  # of the tiny models
ULPS = 8  # of one block: a norm, two or three products, a softmax or an activation
BLOCKS = 2 * LAYERS + 2  # two a layer, the last norm and the head


def rounding(expected: torch.Tensor) -> float:
    """By how much another computation may miss `expected`, in its own unit: ULPS a block of its largest value."""
    finite = expected[expected.isfinite()].detach().abs()
    return ULPS * BLOCKS * torch.finfo(expected.dtype).eps * finite.max().item()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """Two computations of one thing: the same shape and dtype, values no further apart than rounding()."""
    torch.testing.assert_close(
        actual, expected, atol=rounding(expected), rtol=0, msg=lambda text: f"{name}\n{text}" if name else text
    )


def decided(model: Any, *args: torch.Tensor, **settings: Any) -> torch.Tensor:
    """The sequences [B, T] of greedy generate(); AssertionError where rounding could have chosen another token.

    That is where the two best logits are nearer to each other than twice what a computation may miss one by.
    """
    settings = {"do_sample": False, **settings, "return_dict_in_generate": True, "output_scores": True}
    found = model.generate(*args, **settings)
    scores = torch.stack(found.scores, 1)  # [B, new, V], -inf where a token is forbidden
    first, second = scores.topk(2).values.unbind(-1)
    margin, needed = (first - second).min().item(), 2 * rounding(scores)
    assert margin > needed, f"a near tie: the two best logits are {margin:.1e} apart, clear is {needed:.1e}"
    return found.sequences
