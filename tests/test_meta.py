"""Outputs that are made without torch's kernels for `meta`: shape, strides and type as those kernels make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from secateur.graph.meta import MetaKernels

aten = torch.ops.aten


def on_meta(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


NHWC = on_meta(2, 6, 5, 3).permute(0, 3, 1, 2)
LAST = on_meta(2, 3, 6, 5).contiguous(memory_format=torch.channels_last)
CHANNELS = (on_meta(3),) * 4
NORM = (False, 0.1, 1e-5, False)
HALF = on_meta(2, 3, dtype=torch.float16)

CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "batch_norm": (aten.batch_norm.default, (on_meta(2, 3, 6, 5), *CHANNELS, *NORM)),
    "batch_norm of a sequence": (aten.batch_norm.default, (on_meta(2, 3, 6), *CHANNELS, *NORM)),
    "batch_norm without weights": (aten.batch_norm.default, (on_meta(2, 3), None, None, *CHANNELS[:2], *NORM)),
    "batch_norm, permuted": (aten.batch_norm.default, (NHWC, *CHANNELS, *NORM)),
    "batch_norm, channels last": (aten.batch_norm.default, (LAST, *CHANNELS, *NORM)),
    "layer_norm": (aten.layer_norm.default, (on_meta(2, 5, 3), [3], *CHANNELS[:2], 1e-5, True)),
    "layer_norm over two": (aten.layer_norm.default, (on_meta(2, 5, 3), [5, 3], on_meta(5, 3), None, 1e-5, True)),
    "layer_norm without weights": (aten.layer_norm.default, (on_meta(2, 5, 3), [3], None, None, 1e-5, True)),
    "layer_norm, permuted": (aten.layer_norm.default, (LAST.permute(0, 2, 3, 1), [3], *CHANNELS[:2], 1e-5, True)),
    "gelu": (aten.gelu.default, (on_meta(2, 5, 3),)),
    "gelu, permuted": (aten.gelu.default, (NHWC,)),
    "linear": (aten.linear.default, (on_meta(2, 5, 3), on_meta(7, 3), on_meta(7))),
    "linear without bias": (aten.linear.default, (on_meta(2, 3), on_meta(7, 3))),
    "linear of a vector": (aten.linear.default, (on_meta(3), on_meta(7, 3))),
    "linear, permuted": (aten.linear.default, (LAST.permute(0, 2, 3, 1), on_meta(7, 3))),
    "linear to a number": (aten.linear.default, (on_meta(2, 3), on_meta(3))),
    "linear in half precision": (aten.linear.default, (HALF, on_meta(7, 3, dtype=torch.float16))),
    "cat": (aten.cat.default, ([on_meta(2, 3, 4), on_meta(2, 5, 4)], 1)),
    "cat, counted from behind": (aten.cat.default, ([on_meta(2, 3, 4), on_meta(2, 3, 1)], -1)),
    "cat of rows": (aten.cat.default, ([on_meta(2, 3), on_meta(4, 3)],)),
    "cat of vectors": (aten.cat.default, ([on_meta(2), on_meta(4)],)),
    "cat with nothing": (aten.cat.default, ([on_meta(2, 3), on_meta(0)], 1)),
    "cat, channels last": (aten.cat.default, ([LAST, LAST], 1)),
    "cat of two types": (aten.cat.default, ([on_meta(2, 3), HALF], 0)),
}

WRONG: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "batch_norm": (aten.batch_norm.default, (on_meta(2, 4, 6, 5), *CHANNELS, *NORM)),
    "layer_norm": (aten.layer_norm.default, (on_meta(2, 5, 4), [3], *CHANNELS[:2], 1e-5, True)),
    "linear": (aten.linear.default, (on_meta(2, 4), on_meta(7, 3))),
    "linear's bias": (aten.linear.default, (on_meta(2, 3), on_meta(7, 3), on_meta(6))),
    "cat": (aten.cat.default, ([on_meta(2, 3), on_meta(3, 4)], 0)),
    "cat of two ranks": (aten.cat.default, ([on_meta(2, 3), on_meta(2, 3, 1)], 1)),
}


@pytest.mark.parametrize("name", CALLS)
def test_outputs_are_like_those_of_torch(name: str) -> None:
    func, args = CALLS[name]
    kernels = MetaKernels()
    expected = func(*args)
    for _ in range(2):  # made, then made from memory
        output = kernels.run(func, args, {})
        assert (output.shape, output.stride(), output.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert output.is_meta


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sizes_are_refused_by_torch(name: str) -> None:
    func, args = WRONG[name]
    with pytest.raises((RuntimeError, ValueError)):
        MetaKernels().run(func, args, {})


def test_layers_get_what_they_get_without() -> None:
    x = on_meta(2, 5, 3)
    assert MetaKernels().run(aten.gelu.default, (x,), {"approximate": "tanh"}).shape == F.gelu(x).shape
