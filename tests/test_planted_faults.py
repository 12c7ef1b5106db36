"""The checks are checked: rules and engine made wrong on purpose are refused, or shown up by the invariants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attention_nets  # noqa: F401  (these fill HARD_NETS)
import hard_nets  # noqa: F401
import layer_nets  # noqa: F401
import picture_nets  # noqa: F401
import secateur
from models import build as build_model
from models import images, random_scores, reference
from nets import IMAGE, TOKENS, Net, Run, conv, weights
from nets import build as build_net
from planted_faults import (
    CONSTANT,
    NOTHING,
    REVERSED,
    SHIFTED,
    TRUE,
    UNTIED,
    Fault,
    all_uniform,
    always,
    any_number,
    as_it_was,
    attributes_alone,
    behind,
    copies_are_free,
    drops,
    first_operand_alone,
    first_run_again,
    forgets,
    given,
    instead,
    interleaved,
    keeps_argument,
    no_attributes,
    nobody_is_protected,
    only_outer,
    plain_view,
    plant,
    quotients_hold,
    same_sign,
    sides_swapped,
    sole_sort,
    squared,
    states,
    swapped_operands,
    tiled,
    value_alone,
    without_kernel,
)
from secateur import CutError
from secateur.graph.copies import output_tensors

Tensor = torch.Tensor
OWN: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {}


def own(attributes: Callable[[], dict[str, Any]], *shapes: tuple[int, ...]) -> Callable[[Run], Run]:
    """Returns a decorator that makes of a function the forward of a net to plant faults in."""

    def add(run: Run) -> Run:
        OWN[run.__name__] = (lambda: Net(run, **attributes()), shapes or (TOKENS,))
        return run

    return add


def _linear(width: int, read: int | None = None, **others: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "a": nn.Linear(6, width),
        "b": nn.Linear(read or width, 3),
        **{k: v() for k, v in others.items()},
    }


@own(lambda: {"a": conv(3, 8), "b": conv(3, 6), "c": conv(14, 3)}, IMAGE)
def concatenation(m: Net, x: Tensor) -> Tensor:
    return m.c(torch.cat([m.a(x), m.b(x)], 1)).mean((2, 3))


@own(_linear(9, c=lambda: nn.Linear(6, 9)))
def two_terms(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x) + m.c(x))


@own(_linear(9, c=lambda: nn.Linear(9, 9)))
def residual(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y + m.c(F.relu(y)))


@own(_linear(12, 8))
def slices(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(F.relu(y)[..., :8] * y[..., 4:])


@own(_linear(12, 6, c=lambda: nn.Linear(6, 3)))
def every_other(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y[..., ::2]) - m.c(F.relu(y[..., 1::2]))


@own(_linear(12))
def selection(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * y[..., 3].unsqueeze(-1))


@own(_linear(12))
def taken_apart(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * y.unbind(-1)[3][..., None])


@own(_linear(12, 6, c=lambda: nn.Linear(6, 3)))
def halves(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, -1)
    return m.b(left) - m.c(right)


@own(_linear(12))
def mean_by_width(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * (y.sum(-1, keepdim=True) / y.shape[-1]))


@own(_linear(12))
def flip_of_tokens(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y.flip(-1) + y)


@own(_linear(12))
def roll(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x).roll(3, -1))


@own(_linear(8, 16))
def repeat_interleave(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x).repeat_interleave(2, 2))


@own(_linear(8, 16))
def repeat(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x).repeat(1, 1, 2))


@own(_linear(12))
def maximum(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * y.argmax(-1, keepdim=True))


@own(_linear(12, s=lambda: weights(1)))
def expanded_to_a_constant(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x) * m.s.expand(12))


@own(_linear(12, 16))
def padded(m: Net, x: Tensor) -> Tensor:
    return m.b(F.pad(m.a(x), (1, 3)))


@own(_linear(12))
def numbered(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * torch.arange(y.shape[-1], device=x.device))


@own(_linear(12))
def of_zeros(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(torch.maximum(y, torch.zeros_like(y)))


@own(_linear(12))
def in_order(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x).sort(-1).values)


@own(_linear(12, 3))
def windows_of_channels(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)).unfold(-1, 4, 4).mean(-1))


@own(_linear(12, 3, index=lambda: nn.Buffer(torch.tensor([7, 2, 4]))))
def channels_by_a_table(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x)[..., m.index])


@own(_linear(9, c=lambda: nn.Linear(6, 9), index=lambda: nn.Buffer(torch.tensor([1, 4]))))
def written_by_a_table(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    y[:, m.index] = m.c(x)[:, :2]
    return m.b(y)


@own(_linear(9, c=lambda: nn.Linear(6, 9), index=lambda: nn.Buffer(torch.tensor([1, 4, 0, 0, 2]))))
def added_by_a_table(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)).index_add(1, m.index, m.c(x)))


@own(_linear(9, index=lambda: nn.Buffer(torch.tensor([1, 4, 0]))))
def gathered_tokens(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y.gather(1, m.index[None, :, None].expand(x.shape[0], -1, y.shape[-1])))


@own(_linear(9, 3, index=lambda: nn.Buffer(torch.tensor([7, 4, 0]))))
def gathered_channels(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x).gather(-1, m.index.expand(*x.shape[:2], -1)))


@own(
    lambda: {"a": conv(3, 8), "b": conv(8, 3), "boxes": nn.Buffer(torch.tensor([[0, 1, 1, 6, 6], [1, 0, 2, 5, 7.0]]))},
    IMAGE,
)
def regions(m: Net, x: Tensor) -> Tensor:
    return m.b(torchvision.ops.roi_align(m.a(x), m.boxes, 4))


@own(_linear(12, edges=lambda: nn.Buffer(torch.tensor([-1.0, 0.0, 1.0]))))
def numbers_of_bins(m: Net, x: Tensor) -> Tensor:
    return m.b(torch.bucketize(m.a(x), m.edges).to(m.b.weight.dtype))


@own(_linear(9))
def by_value(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x)).flatten(0, 1)
    return m.b(y)[(y.sum(-1) > 1.5).nonzero()[:, 0]]


@own(_linear(9))
def by_remainder(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(F.relu(y) if y.shape[-1] % 5 else y)


@own(_linear(12))
def by_divisibility(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(F.relu(y) if y.shape[-1] % 4 == 0 else y)


@own(_linear(9, c=lambda: nn.Linear(9, 3), d=lambda: nn.Linear(6, 9)))
def stacked(m: Net, x: Tensor) -> Tensor:
    left, right = torch.stack([m.a(x), m.d(x)])
    return m.b(left) - m.c(F.relu(right))


@own(_linear(8))
def halves_with_a_gate_each(m: Net, x: Tensor) -> Tensor:
    y = torch.stack(m.a(x).chunk(2, -1), 2)
    return m.b((y * y.square().sum(-1, keepdim=True).sigmoid()).flatten(2))


def _heads(m: Net, *layers: nn.Linear) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda x: tuple(f(x).view(*x.shape[:2], m.heads, -1).transpose(1, 2) for f in layers)


def _attend(q: Tensor, v: Tensor, scale: float = 0.4) -> Tensor:
    return (q @ q.mT * scale).softmax(-1) @ v


@own(lambda: {"qkv": nn.Linear(6, 48), "mix": nn.Linear(4, 4), "b": nn.Linear(16, 3), "heads": 4})
def heads_of_two_sorts(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(*x.shape[:2], 3, m.heads, -1).permute(2, 0, 3, 1, 4)
    scores = m.mix((q @ k.mT * 0.4).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return m.b((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@own(lambda: {"a": nn.Linear(6, 16), "c": nn.Linear(6, 12), "b": nn.Linear(3, 3), "heads": 4})
def heads_that_meet(m: Net, x: Tensor) -> Tensor:
    left, right = (_attend(y, y) for y in _heads(m, m.a, m.c)(x))
    return m.b((left[..., :, None] * right[..., None, :]).sum((1, 3)))


@own(lambda: {"a": nn.Linear(6, 16), "v": nn.Linear(6, 16), "b": nn.Linear(16, 3), "heads": 4, "head_dim": 4})
def temperature_by_a_reciprocal(m: Net, x: Tensor) -> Tensor:
    q, v = (f(x).view(*x.shape[:2], m.heads, m.head_dim).transpose(1, 2) for f in (m.a, m.v))
    return m.b(_attend(q, v, 1 / math.sqrt(m.head_dim)).transpose(1, 2).flatten(2))


@own(lambda: {"a": nn.Linear(6, 16), "v": nn.Linear(6, 16), "b": nn.Linear(16, 3), "heads": 4, "head_dim": 4})
def halves_of_heads(m: Net, x: Tensor) -> Tensor:
    q, v = (f(x).view(*x.shape[:2], m.heads, m.head_dim).transpose(1, 2) for f in (m.a, m.v))
    half = m.head_dim // 2
    q = torch.cat([q[..., half:].tanh(), q[..., :half]], -1)
    return m.b(_attend(q, v).transpose(1, 2).flatten(2))


@own(lambda: {"a": nn.Linear(6, 16), "v": nn.Linear(6, 16), "b": nn.Linear(16, 3), "token": weights(16), "heads": 4})
def written_queries(m: Net, x: Tensor) -> Tensor:
    q = m.a(x)
    q[:, 0] = m.token
    q, v = (y.view(*x.shape[:2], m.heads, -1).transpose(1, 2) for y in (q, m.v(x)))
    return m.b(F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2))


@own(_linear(9, w=lambda: weights(9, 6)))
def turned_weight(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(x @ m.w.t()))


@own(_linear(9))
def copied(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x).clone()))


@own(_linear(9))
def expanded(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x)).mean(1, keepdim=True)
    return m.b(y.expand(-1, 5, -1))


@own(_linear(9, n=lambda: 9))
def above_zeros(m: Net, x: Tensor) -> Tensor:
    return m.b(torch.maximum(m.a(x), torch.zeros(m.n, dtype=x.dtype, device=x.device)))


@own(lambda: {"a": nn.Linear(6, 16), "b": nn.Linear(5, 3), "c": nn.Linear(11, 3), "n": 5, "both": 16})
def split_of_a_sum(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x).split([m.n, m.both - m.n], -1)
    return m.b(F.relu(left)) + m.c(F.relu(right))


@own(_linear(9, 18, n=lambda: 9))
def twice_a_width(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(torch.cat([y, F.relu(y)], -1).view(*x.shape[:2], 2 * m.n))


MODELS = ("vit", "beit", "swin", "resnet18")


def build(subject: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Returns a net of this file, of the others, or a real model, with random values, and inputs for it."""
    if subject in MODELS:
        return build_model(subject), (images(),)
    if subject not in OWN:
        return build_net(subject)
    torch.manual_seed(0)
    make, shapes = OWN[subject]
    return make().double().eval(), tuple(torch.randn(s, dtype=torch.float64) for s in shapes)


DIMS: dict[str, Any] = {"ratios": {"heads": 0.0, "head_dims": 0.5}}
BOTH: dict[str, Any] = {"ratios": {"head_dims": 0.5}}
MOST: dict[str, Any] = {"ratio": 0.95, "min_channels": 1}
FAULTS: dict[str, Fault] = {
    # operators that move elements
    "clone shifts positions": Fault("clone", SHIFTED, "copied"),
    "dropout shifts positions": Fault("dropout", SHIFTED, "inverted_residual_pieces"),
    "permute forgets to permute": Fault("permute", instead(as_it_was), "vit"),
    "transpose forgets to transpose": Fault("transpose", instead(as_it_was), "attention_sqrt"),
    "t shifts positions": Fault("t", SHIFTED, "turned_weight"),
    "unsqueeze at another place": Fault("unsqueeze", instead(behind), "attention_by_neighbouring_channels"),
    "expand shifts positions": Fault("expand", SHIFTED, "expanded"),
    "expand takes a constant for any size": Fault(
        "graph.rules_shape:_copied", copies_are_free, "expanded_to_a_constant"
    ),
    "view forgets sizes": Fault("view", forgets("require"), "vit"),
    "view forgets the order of what it merges": Fault("view", instead(plain_view), "channel_shuffle"),
    "view shifts positions": Fault("view", SHIFTED, "attention_power", BOTH),
    "flattening shifts positions": Fault("flatten", SHIFTED, "flattened_feature_map"),
    "slice holds no positions": Fault("slice", forgets("require", "hold"), "slices"),
    "slice of a fixed part holds no positions": Fault("slice", forgets("require", "hold"), "fixed_slices"),
    "slice shifts positions": Fault("slice", SHIFTED, "ghost_module"),
    "slice with a step forgets whose turn it is": Fault("slice", forgets("bundle"), "every_other"),
    "slice of a head's width holds no sizes": Fault("slice", forgets("require", "add_fibres"), "halves_of_heads", DIMS),
    "select holds no positions": Fault("select", forgets("hold"), "selection"),
    "unbind holds no positions": Fault("unbind", forgets("hold"), "taken_apart"),
    "split holds no sizes": Fault("split_with_sizes", forgets("require"), "uneven_split"),
    "split by a list holds no sizes": Fault("split_with_sizes", forgets("require"), "partial_convolution"),
    "halves may differ": Fault("chunk", forgets("add_fibres"), "halves"),
    "cat in the wrong order": Fault("cat", swapped_operands, "concatenation"),
    "cat in the wrong order, of what was concatenated": Fault("cat", swapped_operands, "dense_concatenation"),
    "stack lets widths differ": Fault("stack", forgets("add_fibres"), "stacked"),
    "stack lets a part go": Fault("stack", forgets("pin"), "halves_with_a_gate_each"),
    "repeat taken for repeat_interleave": Fault("repeat", instead(interleaved), "repeat"),
    "repeat_interleave taken for repeat": Fault("repeat_interleave", instead(tiled), "repeat_interleave"),
    "heads repeated in the wrong order": Fault("repeat_interleave", instead(tiled), "grouped_queries_repeated"),
    "flip holds no positions": Fault("flip", forgets("hold"), "flip_of_tokens"),
    "flip of feature maps holds no positions": Fault("flip", forgets("hold"), "flip"),
    "roll holds no positions": Fault("roll", forgets("hold"), "roll"),
    "pad at another place": Fault("pad", SHIFTED, "padded"),
    "pixel shuffle forgets what goes together": Fault("pixel_shuffle", forgets("bundle"), "pixel_shuffle"),
    "pixel unshuffle in the wrong order": Fault("pixel_unshuffle", REVERSED, "pixel_unshuffle"),
    "channel shuffle forgets what goes together": Fault("channel_shuffle", forgets("bundle"), "channel_shuffle_module"),
    # contractions
    "linear does not tie its input": Fault("linear", UNTIED, "mlp"),
    "linear forgets its bias": Fault("linear", given(bias=None), "mlp"),
    "linear costs nothing": Fault("linear", forgets("cost"), "mlp"),
    "product does not tie what it contracts": Fault("matmul", UNTIED, "attention_power", BOTH),
    "einsum does not tie what it contracts": Fault("einsum", UNTIED, "attention_einsum", BOTH),
    "einsum may be left with a single index": Fault("einsum", forgets("keep_two"), "einsum_weights", MOST),
    "attention ties nothing": Fault("scaled_dot_product_attention", instead(value_alone), "vit", BOTH),
    "attention forgets its bias": Fault(
        "scaled_dot_product_attention", given(attn_mask=None), "relative_position_bias"
    ),
    "attention changes its temperature": Fault("scaled_dot_product_attention", given(scale=1.0), "vit", DIMS),
    "bilinear ties nothing": Fault("_trilinear", UNTIED, "bilinear"),
    "convolution does not tie its input": Fault("conv2d", UNTIED, "dense_concatenation"),
    "convolution forgets its bias": Fault("conv2d", given(bias=None), "flattened_feature_map"),
    "convolution costs a single position of its kernel": Fault(
        "graph.relations:Relations.cost", without_kernel, "dense_concatenation"
    ),
    "convolution keeps what it slides along": Fault(
        "graph.rules_conv:_without_slides", keeps_argument, "attention_by_neighbouring_channels"
    ),
    "grouped convolution forgets what goes together": Fault("conv2d", forgets("bundle"), "two_grouped_convs"),
    "groups of a convolution may differ": Fault("conv2d", forgets("add_fibres"), "grouped_conv"),
    "grouped convolution with a single output per group": Fault("conv2d", forgets("keep_two"), "grouped_conv", MOST),
    "depthwise convolution does not tie its sides": Fault("conv2d", UNTIED, "inverted_residual_pieces"),
    "depthwise convolution forgets its number of groups": Fault(
        "conv2d", forgets("require"), "inverted_residual_pieces"
    ),
    "transposed convolution taken for a plain one": Fault(
        "graph.rules_conv:_Convolved.weight", sides_swapped, "transposed_conv"
    ),
    "grouped transposed convolution does not tie its input": Fault(
        "conv_transpose2d", forgets("tie"), "grouped_transposed_conv"
    ),
    # other operators that compute
    "add does not tie its operands": Fault("add", instead(first_operand_alone), "two_terms"),
    "residual add does not tie its operands": Fault("add", instead(first_operand_alone), "vit"),
    "mul does not tie its operands": Fault("mul", instead(first_operand_alone), "gated_mlp"),
    "relu shifts positions": Fault("relu", SHIFTED, "residual"),
    "softmax loses heads": Fault("softmax", CONSTANT, "attention_power", BOTH),
    "layer norm forgets its scale": Fault("layer_norm", UNTIED, "vit"),
    "layer norm forgets its width": Fault("layer_norm", forgets("require"), "class_token"),
    "batch norm forgets its statistics": Fault("batch_norm", UNTIED, "resnet18"),
    "groups of a norm may differ": Fault("group_norm", forgets("add_fibres"), "group_norms"),
    "group norm forgets its number of groups": Fault("group_norm", forgets("require"), "group_norms"),
    "argmax holds no positions": Fault("argmax", forgets("hold"), "maximum"),
    "reduction forgets the heads that are left": Fault("sum", states(reduce=drops), "mixture_of_modules"),
    "pooling shifts positions": Fault("max_pool2d", SHIFTED, "flattened_feature_map"),
    "zeros of another size": Fault("zeros", forgets("require"), "above_zeros"),
    "numbers in a row taken for any": Fault("arange", instead(any_number), "numbered"),
    "glu does not tie its halves": Fault("glu", UNTIED, "glu"),
    "sort holds no positions": Fault("sort", forgets("hold"), "in_order"),
    "weight norm forgets its lengths": Fault("_weight_norm", UNTIED, "weight_norm_as_a_hook"),
    # reading and writing by position
    "windows hold no positions": Fault("unfold", forgets("hold"), "windows_of_channels"),
    "patches in the wrong order": Fault("im2col", REVERSED, "unfolded_patches"),
    "folding forgets what goes together": Fault("col2im", forgets("bundle"), "folded_patches"),
    "table shifts its columns": Fault("index", SHIFTED, "swin"),
    "embedding shifts its columns": Fault("embedding", SHIFTED, "tied_embedding"),
    "table holds no positions": Fault("index", forgets("hold"), "channels_by_a_table"),
    "what is written is not tied": Fault("index_put", UNTIED, "written_by_a_table"),
    "what is added is not tied": Fault("index_add", UNTIED, "added_by_a_table"),
    "gather holds no positions": Fault("gather", forgets("hold"), "gathered_channels"),
    "gather shifts what passes": Fault("gather", SHIFTED, "gathered_tokens"),
    "regions shift channels": Fault("roi_align", SHIFTED, "regions"),
    "numbers of bins hold no positions": Fault("bucketize", forgets("freeze"), "numbers_of_bins"),
    "bags shift their columns": Fault("_embedding_bag", SHIFTED, "embedding_bag"),
    # relations
    "ties are lost": Fault("graph.relations:Relations.tie", NOTHING, "gated_mlp"),
    "what goes together is lost": Fault("graph.relations:Relations.bundle", NOTHING, "pixel_shuffle"),
    "fibres may differ": Fault("graph.relations:Relations.add_fibres", NOTHING, "halves"),
    "heads are lost": Fault("graph.relations:Relations.own", NOTHING, "attention_talking"),
    "nothing is frozen": Fault("graph.relations:Relations.freeze", NOTHING, "roll"),
    "no position is held": Fault("graph.relations:Relations.hold", NOTHING, "flip"),
    "components that share a dimension are not related": Fault(
        "graph.relations:Relations._share", NOTHING, "heads_that_meet"
    ),
    "a merged dimension forgets its inner side": Fault(
        "graph.relations:Relations.fuse", instead(only_outer), "multi_query"
    ),
    "sizes that are computed with are forgotten": Fault("graph.relations:Relations.number", NOTHING, "mean_by_width"),
    "remainders are forgotten": Fault("graph.relations:Relations.remainder", NOTHING, "by_remainder"),
    "compared sizes are forgotten": Fault("graph.relations:Relations.compare", NOTHING, "torch_encoder"),
    # requirements on sizes
    "attributes are not followed": Fault("graph.requirements:_Settling.place", no_attributes, "attention_power", DIMS),
    "sizes are not linked": Fault("graph.requirements:_Settling.place", attributes_alone, "beit"),
    "sums are taken for settled": Fault("graph.requirements:_Settling._sum", TRUE, "split_of_a_sum"),
    "products are taken for settled": Fault("graph.requirements:_Settling._product", TRUE, "twice_a_width"),
    "quotients are taken for settled": Fault("graph.requirements:_Settling._quotient", TRUE, "halves_of_heads", DIMS),
    "a quotient beside its divisor is not required": Fault("graph.rules_shape:_require_quotient", quotients_hold, "torch_encoder"),
    "what cannot be met is not frozen": Fault(
        "graph.requirements:_Settling.refuse", NOTHING, "constants_in_the_code", BOTH
    ),
    # temperatures
    "temperatures are not kept": Fault("graph.groups:_scale_fixes", always(()), "attention_power", DIMS),
    "a root is taken for the size": Fault("graph.relations:Relations.power", squared, "attention_sqrt", DIMS),
    "a temperature is not noted": Fault("graph.relations:Relations.power", NOTHING, "attention_sqrt", DIMS),
    "a reciprocal is taken for the root": Fault(
        "graph.sizes:Power.__rtruediv__", same_sign, "temperature_by_a_reciprocal", DIMS
    ),
    # solving, and what allocation makes of it
    "what keeps the size of something frozen is free": Fault("graph.solve:_settle", NOTHING, "beit"),
    "links of heads look at one sort": Fault("graph.solve:_Sets.of_extent", sole_sort, "heads_of_two_sorts"),
    "heads beside something that stays are free": Fault(
        "graph.solve:_row_extents", always(()), "mha_mask_for_each_head"
    ),
    "links that conflict are not refused": Fault(
        "allocation.ladders:sort_links", all_uniform, "mha_mask_for_each_head", BOTH
    ),
    "of what two must stay, one may": Fault(
        "allocation.allocate:_protected", nobody_is_protected, "grouped_conv", MOST
    ),
    # tracing
    "what is written into a part is free": Fault("graph.tracer:_is_part", always(False), "written_queries", DIMS),
    "decisions by values are not repeated": Fault("graph.values:Values.repeated", first_run_again, "by_value"),
}


def verdict(subject: str, request: Mapping[str, Any], seed: int) -> str:
    """Returns who noticed that something is wrong: "refused" for the library itself, an invariant, or "nobody"."""
    model, inputs = build(subject)
    network = secateur.trace(model, inputs)
    known = {name for g in network.groups for name in (g.kind, g.name)}
    options = {"ratio": 0.4, **request, "ratios": {k: v for k, v in request.get("ratios", {}).items() if k in known}}
    plan = secateur.allocate(network, random_scores(network, seed), **options)
    # built again, not copied: torch cannot copy every module after it has run
    pruned, expected = build(subject)[0], build(subject)[0]
    try:
        secateur.cut_(pruned, plan)
    except CutError:
        return "refused"
    reference(expected, {(c.tensor, c.dim): list(c.removed) for c in plan.cuts})
    with FlopCounterMode(display=False) as counter:
        try:
            found = _values(pruned(*inputs))
        except (RuntimeError, ValueError, IndexError):
            return "does not run"
    with torch.no_grad():
        wanted = _values(expected(*inputs))
    if found.shape != wanted.shape or not (found - wanted).abs().max() < 1e-9 * wanted.abs().max():
        return "other output"
    macs, params = counter.get_total_flops() // 2, sum(p.numel() for p in pruned.parameters())
    return "nobody" if (macs, params) == (plan.macs * inputs[0].shape[0], plan.params) else "other cost"


def _values(output: object) -> Tensor:
    return torch.cat([t.flatten() for t in output_tensors(output)])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_does_not_go_unnoticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    used = plant(fault, monkeypatch)
    verdicts = [verdict(fault.subject, fault.request, seed) for seed in range(3)]
    assert used, "the network does not meet the fault"
    assert set(verdicts) != {"nobody"}
