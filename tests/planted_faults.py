"""One fault at a time, planted into rules and engine: what is made wrong, and the network that meets it."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from secateur.graph.labels import Labels, align_blocks, labels_of, regroup, tensors_in, varying
from secateur.graph.relations import Operand, Relations
from secateur.graph.rules import RULES, Call, Rule, elementwise
from secateur.graph.sizes import Expression, FromAttribute, Power, Quotient, RawExtent

Result = Labels | tuple[Labels, ...] | None
Alter = Callable[[Any], Any]


@dataclass(frozen=True)
class Fault:
    """What is wrong, on which network it shows, and what is asked to be removed there.

    `place` is an operator, whose rule is made wrong, or a function of the engine as `module:name` inside `secateur`;
    `alter` makes the wrong one of the right one.
    """

    place: str
    alter: Alter
    subject: str
    request: Mapping[str, Any] = field(default_factory=dict)


def plant(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts the fault in; returns a list that grows with every use of it."""
    used: list[str] = []

    def counted(right: Any) -> Any:
        wrong = fault.alter(right)

        def call(*args: Any, **kwargs: Any) -> Any:
            used.append(fault.place)
            return wrong(*args, **kwargs)

        return call

    if ":" in fault.place:
        holder, _, name = fault.place.replace(":", ".").rpartition(".")
        owner = pkgutil.resolve_name(f"secateur.{holder}")
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
        return used
    right = RULES.get(fault.place, elementwise)
    for name in [n for n, r in RULES.items() if r is right] or [fault.place]:
        monkeypatch.setitem(RULES, name, counted(right))
    return used


# how a rule is made wrong


def says_nothing(*_: object, **__: object) -> None:
    """A relation that is forgotten."""


def states(**methods: Callable[..., Any]) -> Alter:
    """Returns what makes a rule state its relations through `methods` instead of through those of `Relations`."""

    def alter(right: Rule) -> Rule:
        def wrong(call: Call) -> Result:
            stated = vars(call.relations)
            stated.update(methods)
            try:
                return right(call)
            finally:
                for name in methods:
                    del stated[name]

        return wrong

    return alter


def forgets(*methods: str) -> Alter:
    """Returns what makes a rule forget some of the relations that it should state."""
    return states(**dict.fromkeys(methods, says_nothing))


def unrelated(operands: list[Operand]) -> tuple[np.ndarray, ...]:
    """A join that relates nothing: of components along the same dimensions the first stands for all."""
    found: list[np.ndarray] = []
    for array in (a for o in operands for a in o.arrays if varying(a)):
        if not any(varying(array) & varying(other) for other in found):
            found.append(array)
    return tuple(found)


UNTIED = states(join=unrelated)


def always(result: object) -> Alter:
    """Returns what makes a function return `result`, whatever it is given."""
    return lambda _: lambda *_, **__: result


def instead(wrong: Callable[..., Any]) -> Alter:
    """Returns what puts another function in place of the right one."""
    return lambda _: wrong


def after(change: Callable[[Labels], Labels]) -> Alter:
    """Returns what makes a rule yield changed labels."""

    def alter(right: Rule) -> Rule:
        def wrong(call: Call) -> Result:
            result = right(call)
            return tuple(map(change, result)) if isinstance(result, tuple) else result and change(result)

        return wrong

    return alter


def given(**arguments: Any) -> Alter:
    """Returns what makes a rule read other arguments than those of the call."""
    return lambda right: lambda call: right(replace(call, arguments={**call.arguments, **arguments}))


def shift(labels: Labels) -> Labels:
    """Labels one position further along the last dimension in which they vary."""
    return labels.map(lambda a: np.roll(a, 1, max(varying(a), default=0)))


def reverse(labels: Labels) -> Labels:
    """Labels from the last to the first along the last dimension in which they vary."""
    return labels.map(lambda a: np.flip(a, max(varying(a), default=0)))


SHIFTED, REVERSED = after(shift), after(reverse)
CONSTANT = always(Labels())


def swapped_operands(right: Rule) -> Rule:
    """A concatenation in the wrong order."""
    return lambda call: right(replace(call, arguments={**call.arguments, "tensors": call["tensors"][::-1]}))


def plain_view(call: Call) -> Labels:
    """A view that moves labels rightly and says nothing about fibres, order or sizes."""
    old, new = call.shape("self"), tuple(call.output.shape)
    return call.labels("self").map(lambda a: regroup(a, old, new, align_blocks(old, new)))


def as_it_was(call: Call) -> Labels:
    """A change of layout that leaves labels where they stood."""
    return call.labels("self").map(lambda a: a)


def behind(call: Call) -> Labels:
    """An unsqueeze that puts the new dimension last."""
    return call.labels("self").map(lambda a: a[..., None])


def first_operand_alone(call: Call) -> Labels:
    """An elementwise operation that does not tie its operands."""
    rank = call.output.ndim
    labelled = [t for t in tensors_in(call.arguments) if labels_of(t).arrays]
    labels = labels_of(labelled[0])
    return Labels(tuple(a.reshape((1,) * (rank - a.ndim) + a.shape) for a in labels.arrays))


def value_alone(call: Call) -> Labels:
    """An attention that takes its output for its values: queries and keys do not meet, and there are no heads."""
    return Labels(call.labels("value").arrays)


def tiled(call: Call) -> Labels:
    """repeat_interleave taken for repeat."""
    axis, times = call["dim"], call["repeats"]
    return call.labels("self").map(
        lambda a: np.tile(a, [times if i == axis and a.shape[i] > 1 else 1 for i in range(a.ndim)])
    )


def interleaved(call: Call) -> Labels:
    """repeat taken for repeat_interleave."""
    times = list(call["repeats"])
    return call.labels("self").map(lambda a: np.repeat(a, times[-1], -1) if a.shape[-1] > 1 else a)


def any_number(call: Call) -> Labels:
    """A row of numbers taken for one that may have any length."""
    n = call.output.numel()
    labels = call.relations.new_labels(n)
    call.relations.require(call.expression(n), RawExtent(labels[None], "count"))
    return Labels((labels,))


def drops(arrays: Any, axes: Any) -> tuple[np.ndarray, ...]:
    """A reduction that forgets what is left of a joint dimension."""
    return tuple(a for a in arrays if not varying(a) & set(axes))


# how a function of the engine is made wrong

NOTHING = always(None)
TRUE = always(True)


def keeps_argument(right: Any) -> Any:
    """A step that hands on what it was given."""
    return lambda *args, **_: args[-1]


def without_kernel(right: Any) -> Any:
    """A cost that forgets how often each point of its space is computed."""
    return lambda self, arrays, shape, times=1: right(self, arrays, shape)


def squared(right: Any) -> Any:
    """A root that is taken for the size itself."""
    return lambda self, expression, exponent, weights: right(self, expression, 2 * exponent, weights)


def same_sign(right: Any) -> Any:
    """A reciprocal that keeps its exponent."""
    return lambda self, other: Power(other / float.__add__(self, 0.0), self.base, self.exponent)


def blind(right: Any) -> Any:
    """A check to which all sizes of the cut model are multiples of what they are divided by."""
    return lambda before, after, plan: right(before, replace(after, remainders=0), plan)


def sole_sort(right: Any) -> Any:
    """A link of heads that looks at the first of several sorts alone."""

    def wrong(self: Any, extent: RawExtent) -> Any:
        labels = extent.labels[:, :1] if extent.kind == "rows" else extent.labels
        return right(self, RawExtent(labels, extent.kind, extent.divisor))

    return wrong


def only_outer(self: Relations, outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """A merged dimension in which an index does not go with what lies along the inner one."""
    shape = np.broadcast_shapes(outer.shape, inner.shape)
    joint = self.new_labels(int(np.prod(shape))).reshape(shape)
    rows = joint.reshape(outer.size, -1)
    self.add_fibres(rows)
    self.own(outer.ravel(), rows)
    return joint


def all_uniform(right: Any) -> Any:
    """Links of which none conflicts with another."""

    def wrong(network: Any) -> Any:
        uniform, composite, refused = right(network)
        return uniform + refused, composite, []

    return wrong


def nobody_is_protected(right: Any) -> Any:
    """An allocation that ignores of what two must stay."""
    return lambda network, scores: np.zeros_like(right(network, scores))


def first_run_again(right: Any) -> Any:
    """Decisions by values taken anew in the trace of the cut model."""
    return lambda self: replace(self, decisions=[], next=None)


def quotients_hold(right: Any) -> Any:
    """A view in which n // h beside h is right whatever n becomes."""
    return lambda relations, array, axis, specs: (
        isinstance(specs[axis], Quotient) or right(relations, array, axis, specs)
    )


def sides_swapped(right: Any) -> Any:
    """The two sides of a convolution's weight, one for the other."""
    return lambda self, call: right(self, call)[::-1]


def copies_are_free(right: Any) -> Any:
    """An expansion to a constant size that is taken for one to whatever size it meets."""

    def wrong(call: Call, sizes: Any) -> tuple[tuple[int, Expression | None], ...]:
        before = (1,) * (call.output.ndim - call["self"].ndim) + call.shape("self")
        return tuple((i, None) for i, n in enumerate(before) if n == 1 < call.output.shape[i])

    return wrong


def attributes_alone(right: Any) -> Any:
    """Settling in which sizes of two things are not linked."""

    def wrong(self: Any, expression: Expression, extent: RawExtent, *, last: bool) -> bool:
        return isinstance(expression, RawExtent) or right(self, expression, extent, last=last)

    return wrong


def no_attributes(right: Any) -> Any:
    """Settling in which attributes are not set."""

    def wrong(self: Any, expression: Expression, extent: RawExtent, *, last: bool) -> bool:
        return isinstance(expression, FromAttribute) or right(self, expression, extent, last=last)

    return wrong


# what is asked to be removed, and the faults

DIMS: dict[str, Any] = {"ratios": {"heads": 0.0, "head_dims": 0.5}}
BOTH: dict[str, Any] = {"ratios": {"head_dims": 0.5}}
ONE_INPUT: dict[str, Any] = {"ratio": 0.0, "ratios": {"0": 0.95}, "min_channels": 1}
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
    "a single output per group of a convolution": Fault("conv2d", forgets("keep_two"), "grouped_conv", ONE_INPUT),
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
    "quotients are taken for settled": Fault("graph.requirements:_Settling._quotient", TRUE, "half_of_a_width"),
    "a quotient beside its divisor is not required": Fault(
        "graph.rules_shape:_require_quotient", quotients_hold, "quotient_of_a_width", BOTH
    ),
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
    "links of heads look at one sort": Fault("graph.solve:_Sets.of_extent", sole_sort, "heads_of_two_sorts"),
    "heads beside something that stays are free": Fault(
        "graph.solve:_rows_of_one_size", always(()), "heads_beside_parts"
    ),
    "links that conflict are not refused": Fault(
        "allocation.ladders:sort_links", all_uniform, "mha_mask_for_each_head", BOTH
    ),
    "of what two must stay, one may": Fault(
        "allocation.allocate:_protected", nobody_is_protected, "grouped_conv", ONE_INPUT
    ),
    # tracing
    "decisions by values are not repeated": Fault("graph.values:Values.repeated", first_run_again, "by_value"),
}
HARMLESS: dict[str, Fault] = {
    # a part meets what is written into it, and a constant added to it ends what weights can scale
    "what is added to a part is free": Fault("graph.tracer:_is_part", always(False), "written_queries", DIMS),
    # sizes are then as the code has them, and columns go together: channels are coarser
    "view without fibres": Fault("view", instead(plain_view), "attention_power", BOTH),
    # without fibres, whatever reads the stack ties its parts or freezes them
    "stack lets widths differ": Fault("stack", forgets("add_fibres"), "stacked"),
    # what meets the tensor has labels of its own there: more of them are tied
    "zeros like another tensor shift positions": Fault("zeros_like", SHIFTED, "of_zeros"),
    # allocation takes equally much from all sets of a link, hence nothing if one cannot change
    "what keeps the size of something frozen is free": Fault("graph.solve:_settle", NOTHING, "rotary", DIMS),
}
"""Faults after which a cut is right all the same, and why."""
