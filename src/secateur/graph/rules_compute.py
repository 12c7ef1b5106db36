"""Rules of the operators that compute: contractions, normalisations, reductions, pooling (see `contraction`)."""

from __future__ import annotations

import numpy as np

from secateur.graph.contraction import contract, insert, mark_roles, squeeze, upright, weight_scale, with_bias
from secateur.graph.labels import Ints, Labels, Shape, align_right, slices, varying
from secateur.graph.relations import Operand
from secateur.graph.rules import Call, elementwise, labels_of, operand_of, rule
from secateur.graph.rules_shape import FIXED_POSITION
from secateur.graph.sizes import RawExtent


@rule("linear")
def linear(call: Call) -> Labels:
    """x [..., K], weight [N, K], bias [N]; index space [..., K, N]."""
    rank = call["input"].ndim
    x = insert(operand_of(call["input"], rank), rank)
    weight = call["weight"]
    if weight.ndim == 1:
        weight_operand = insert(operand_of(weight, rank), rank)
    else:
        arrays = tuple(align_right(a.T, rank + 1) for a in labels_of(weight).arrays)
        weight_operand = Operand(arrays, (1,) * (rank - 1) + tuple(weight.shape[::-1]))
    mark_roles(call, labels_of(weight), {0: "out", 1: "in"})
    shape = (*call.shape("input"), weight_operand.shape[-1])
    arrays = squeeze(contract(call, [x, weight_operand], shape, [rank - 1]), rank - 1)
    if weight.ndim == 1:
        return Labels(squeeze(arrays, rank - 1))
    arrays = with_bias(call, arrays, tuple(call.output.shape), rank - 1)
    return Labels(arrays, weight_scale(call, 0, rank, rank - 1))


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm")
def matmul(call: Call) -> Labels:
    """a [..., M, K] @ b [..., K, N] (+ self); index space [..., M, K, N]."""
    names = {
        "addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"),
        "mm": ("self", "mat2"),
        "bmm": ("self", "mat2"),
    }
    left, right = names.get(call.name) or ("self", next(n for n in ("other", "vec", "tensor") if call[n] is not None))
    a, b = call[left], call[right]
    rank = max(a.ndim, b.ndim, 2) + 1
    a_operand = operand_of(a, rank - 1)
    b_operand = operand_of(b, rank - 1) if b.ndim > 1 else insert(operand_of(b, rank - 2), rank - 2)
    a_operand, b_operand = insert(a_operand, rank - 1), insert(b_operand, rank - 3)
    mark_roles(call, labels_of(b), {b.ndim - 1: "out", b.ndim - 2: "in"} if b.ndim > 1 else {0: "in"})
    mark_roles(call, labels_of(a), {a.ndim - 2: "out", a.ndim - 1: "in"} if a.ndim > 1 else {0: "in"})
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*batch, a.shape[-2] if a.ndim > 1 else 1, a.shape[-1], b.shape[-1] if b.ndim > 1 else 1)
    arrays = squeeze(contract(call, [a_operand, b_operand], shape, [rank - 2]), rank - 2)
    if a.ndim == 1:
        arrays = squeeze(arrays, rank - 3)
    if b.ndim == 1:
        arrays = squeeze(arrays, -1)
    if call.name in ("addmm", "baddbmm"):
        out = call.output
        arrays = call.relations.join([Operand(arrays, tuple(out.shape)), operand_of(call["self"], out.ndim)])
        return Labels(arrays)
    return Labels(arrays, factor=_factor(labels_of(a)))


def _factor(left: Labels) -> Ints | None:
    """Returns the labels that scale a product, which are those that scale its left operand."""
    return np.unique(np.concatenate([a.ravel() for a in left.scaling])) if left.scaling else None


@rule("einsum")
def einsum(call: Call) -> Labels | None:
    """Two operands whose subscripts are plain letters; the index space has one dimension for each letter."""
    left, arrow, result = call["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or not arrow or not all(t.isalpha() and len(set(t)) == len(t) for t in terms):
        for array in (a for t in call["tensors"] for a in labels_of(t).arrays):
            for axis in varying(array):
                call.relations.keep_two(slices(array, [i for i in range(array.ndim) if i != axis]))
        return None
    letters = sorted(set(left) - {","})
    sizes: dict[str, int] = {}
    operands = []
    for term, tensor in zip(terms, call["tensors"], strict=True):
        sizes |= {k: max(n, sizes.get(k, 1)) for k, n in zip(term, tensor.shape, strict=True)}
        order = sorted(range(len(term)), key=lambda i, t=term: letters.index(t[i]))
        place = [term.find(k) for k in letters]
        mark_roles(call, labels_of(tensor), {i: "out" if k in result else "in" for i, k in enumerate(term)})

        def lay_out(a: Ints, order: list[int] = order, place: list[int] = place) -> Ints:
            return a.transpose(order).reshape([a.shape[i] if i >= 0 else 1 for i in place])

        shape = tuple(tensor.shape[i] if i >= 0 else 1 for i in place)
        operands.append(Operand(tuple(lay_out(a) for a in labels_of(tensor).arrays), shape))
    gone = [i for i, k in enumerate(letters) if k not in result]
    for array in (a for o in operands for a in o.arrays if varying(a) & set(gone)):
        # torch multiplies element by element where a single index is contracted
        call.relations.keep_two(slices(array, sorted(varying(array) - set(gone))))
    arrays = contract(call, operands, tuple(sizes[k] for k in letters), gone)
    kept = [letters.index(k) for k in result]
    arrays = tuple(a.transpose([*kept, *gone]).reshape([a.shape[i] for i in kept]) for a in arrays)
    return Labels(arrays, factor=_factor(labels_of(call["tensors"][0])))


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Labels:
    """q [..., L, D], k [..., S, D], v [..., S, V], mask [..., L, S]; heads are found where D is contracted away."""
    relations = call.relations
    q, k, v = call["query"], call["key"], call["value"]
    rank = q.ndim + 1
    repeats = q.shape[-3] // k.shape[-3] if call["enable_gqa"] else 1

    def repeated(tensor: Operand, axis: int) -> Operand:
        if tensor.shape[axis] == 1:
            return tensor  # a single head serves all queries: it is broadcast
        arrays = tuple(np.repeat(a, repeats, axis) if a.shape[axis] > 1 else a for a in tensor.arrays)
        return Operand(arrays, (*tensor.shape[:axis], tensor.shape[axis] * repeats, *tensor.shape[axis + 1 :]))

    q_operand, k_operand, v_operand = (operand_of(t, q.ndim) for t in (q, k, v))
    if repeats > 1:
        k_operand, v_operand = repeated(k_operand, q.ndim - 3), repeated(v_operand, q.ndim - 3)
    batch = tuple(q.shape[:-2])
    queries, width = q.shape[-2:]
    keys, value_width = v.shape[-2:]
    if call["scale"] is None:
        _keep_temperature(call, q_operand, q.ndim)
    sides = [insert(q_operand, rank - 2), insert(k_operand, rank - 3)]
    scores = contract(call, sides, (*batch, queries, keys, width), [rank - 1])
    scores = squeeze(scores, rank - 1)
    if call["attn_mask"] is not None:
        shape = (*batch, queries, keys)
        scores = relations.join([Operand(scores, shape), operand_of(call["attn_mask"], q.ndim)])
    sides = [insert(Operand(scores, (*batch, queries, keys)), rank - 1), insert(v_operand, rank - 3)]
    mixed = contract(call, sides, (*batch, queries, keys, value_width), [rank - 2])
    return Labels(squeeze(mixed, rank - 2))


def _keep_temperature(call: Call, q: Operand, rank: int) -> None:
    """The operator divides by sqrt(D) of the cut tensor: remember which weights can make up for it."""
    weights = call.labels("query").scaling or call.labels("key").scaling
    for array in q.arrays:
        if array.shape[rank - 1] > 1:
            if weights:
                call.relations.scale_fixes.append((weights, call.relations.extent(array, rank - 1), 0.5))
            else:
                why = "it sets the temperature of an attention that no weight can restore"
                call.relations.freeze(array, why, channel_only=True)


def _affine(call: Call, arrays: tuple[Ints, ...], shape: Shape, axes: list[int]) -> tuple[Ints, ...]:
    """Returns the components after the tensors of a normalisation (scale, shift, statistics) have met `axes`."""
    operands = [Operand(arrays, shape)]
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = call[name]
        if tensor is None:
            continue
        here = [n if i in axes else 1 for i, n in enumerate(shape)]
        found = []
        for array in labels_of(tensor).arrays:
            sizes = iter(array.shape)
            found.append(array.reshape([next(sizes) if i in axes else 1 for i in range(len(shape))]))
        operands.append(Operand(tuple(found), tuple(here)))
        if name == "weight" and labels_of(tensor).is_parameter:
            for array in labels_of(tensor).arrays:
                call.mark_role(array, "norm")
    return call.relations.join(operands)


def _affine_scale(call: Call, rank: int, axes: list[int]) -> tuple[Ints, ...] | None:
    """Returns weight and bias labels as components of the output: scaling both scales what a normalisation yields."""
    if call["weight"] is None or len(axes) != 1:
        return None
    here = [-1 if i in axes else 1 for i in range(rank)]
    tensors = [call.labels(n) for n in ("weight", "bias") if call[n] is not None]
    if not all(t.scale for t in tensors):
        return None
    return tuple(a.reshape(here) for t in tensors for a in t.scale or ())


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Labels:
    """Statistics over the last dimensions, whatever survives there."""
    x = call["input"]
    axes = list(range(x.ndim - len(call["normalized_shape"]), x.ndim))
    specs = call.expressions(call["normalized_shape"])
    for array in call.labels("input").arrays:
        for axis, spec in zip(axes, specs, strict=True):
            if array.shape[axis] > 1:
                call.relations.require(spec, call.relations.extent(array, axis))
    arrays = _affine(call, call.labels("input").arrays, tuple(x.shape), axes)
    return Labels(arrays, _affine_scale(call, x.ndim, axes), call.labels("input").is_parameter)


@rule("batch_norm", "native_batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(call: Call) -> Labels:
    x = call["input"]
    arrays = _affine(call, call.labels("input").arrays, tuple(x.shape), [1])
    return Labels(arrays, _affine_scale(call, x.ndim, [1]), call.labels("input").is_parameter)


@rule("group_norm", "native_group_norm")
def group_norm(call: Call) -> Labels:
    """Statistics over each group of channels: groups lose equally many."""
    x, groups = call["input"], int(call["num_groups"] or call["group"])
    for array in call.labels("input").arrays:
        if array.shape[1] == 1 or groups == 1:
            continue
        if varying(array) != {1}:
            call.relations.freeze(array, "group normalisation over a joint dimension")
        elif array.shape[1] == groups:
            call.relations.require(call.expressions([groups])[0], RawExtent(array.reshape(1, -1), "count"))
        else:
            call.relations.add_fibres(array.reshape(groups, -1))
    arrays = _affine(call, call.labels("input").arrays, tuple(x.shape), [1])
    return Labels(arrays, _affine_scale(call, x.ndim, [1]), call.labels("input").is_parameter)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "logcumsumexp", "softmin")
def along(call: Call) -> Labels:
    """Computed along a dimension over whatever survives there."""
    return Labels(call.labels("self").arrays)


@rule(
    *("sum", "mean", "amax", "amin", "max", "min", "prod", "any", "all", "logsumexp", "norm", "linalg_vector_norm"),
    *("var", "std", "var_mean", "std_mean", "median", "argmax", "argmin", "count_nonzero", "nansum"),
)
def reduction(call: Call) -> Labels | tuple[Labels, ...]:
    """Some dimensions are reduced away; reading a position of the result holds positions."""
    if call["other"] is not None:
        return elementwise(call)
    x = call["self"]
    dims = call["dim"]
    axes = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    axes = sorted({i % max(1, x.ndim) for i in axes})
    if call.name in ("argmax", "argmin", "median") or (call.name in ("max", "min") and dims is not None):
        for array in call.labels("self").arrays:
            for axis in varying(array) & set(axes):
                call.relations.hold(array, axis, FIXED_POSITION)
    arrays = call.relations.reduce(call.labels("self").arrays, axes)
    if not call["keepdim"]:
        arrays = tuple(a.reshape([n for i, n in enumerate(a.shape) if i not in axes]) for a in arrays)
    labels = Labels(arrays, None, call.labels("self").is_parameter)
    return labels if not isinstance(call.output, (tuple, list)) else (labels,) * len(call.output)


@rule(
    *(
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "_adaptive_avg_pool2d",
        "avg_pool1d",
        "avg_pool2d",
    ),
    *("avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "adaptive_max_pool2d"),
    *(
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "_upsample_bilinear2d_aa",
        "upsample_bicubic2d",
    ),
    *("_upsample_bicubic2d_aa", "upsample_linear1d", "upsample_nearest3d", "upsample_trilinear3d", "reflection_pad2d"),
    *("replication_pad2d", "grid_sampler", "grid_sampler_2d", "_upsample_nearest_exact2d"),
)
def spatial(call: Call) -> Labels | tuple[Labels, ...]:
    """Works on the dimensions behind the channels, each channel alone."""
    first = 2 if call[call.subject].ndim > 2 else 1
    labels = call.labels(call.subject)
    for array in labels.arrays:
        if any(i >= first for i in varying(array)):
            call.relations.freeze(array, "pooled or resized along a labelled dimension")
    passing = Labels(
        tuple(a for a in labels.arrays if not any(i >= first for i in varying(a))), None, labels.is_parameter
    )
    return passing if not isinstance(call.output, (tuple, list)) else (passing,) * len(call.output)


@rule(
    *("zeros", "ones", "full", "empty", "rand", "randn"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
)
def fresh(call: Call) -> Labels:
    """A tensor without a pattern: along a dimension that a size of the model decides, it is as long as that asks."""
    arrays: list[Ints] = []
    for axis, expression in enumerate(call.expressions(call["size"])):
        if isinstance(expression, int | None) or call.output.shape[axis] == 1:
            continue
        labels = call.relations.new_labels(int(call.output.shape[axis]))
        call.relations.require(expression, RawExtent(labels[None], "count"))
        arrays.append(upright(labels, call.output.ndim, axis))
    return Labels(tuple(arrays))


@rule("sym_size", "sym_numel", "arange", "linspace", "eye")
def positions(call: Call) -> Labels:
    """Numbers in order: each position along them has a meaning."""
    return Labels()


@rule("glu")
def glu(call: Call) -> Labels:
    """The first half of a dimension, gated by the second half: both keep the same indices."""
    x, rank = call["self"], call["self"].ndim
    axis = call["dim"] % rank
    for array in (a for a in call.labels("self").arrays if a.shape[axis] > 1):
        call.relations.add_fibres(slices(array, [i for i in range(rank) if i != axis]).reshape(-1, x.shape[axis] // 2))
    halves = []
    for half in (slice(None, x.shape[axis] // 2), slice(x.shape[axis] // 2, None)):
        index = (*[slice(None)] * axis, half)
        arrays = tuple(a[index] if a.shape[axis] > 1 else a for a in call.labels("self").arrays)
        halves.append(Operand(arrays, tuple(call.output.shape)))
    return Labels(call.relations.join(halves))


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
def like(call: Call) -> Labels:
    return Labels(call.labels("self").arrays)


@rule("topk", "sort", "argsort")
def ordering(call: Call) -> tuple[Labels, ...] | Labels:
    axis = call.axis() if call["self"].ndim else 0
    labels = call.labels("self")
    for array in labels.arrays:
        if array.shape[axis] > 1:
            call.relations.hold(array, axis, "sorted")
    passing = Labels(tuple(a for a in labels.arrays if a.shape[axis] == 1))
    return passing if not isinstance(call.output, (tuple, list)) else (passing,) * len(call.output)


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> Labels | tuple[Labels, ...]:
    """v scaled to the norm g along all dimensions but `dim`."""
    rank = call["v"].ndim
    arrays = call.relations.join([operand_of(call["v"], rank), operand_of(call["g"], rank)])
    is_parameter = call.labels("v").is_parameter and call.labels("g").is_parameter
    weight = Labels(arrays, call.labels("g").scale, is_parameter)
    return (weight, call.labels("g").map(lambda a: a)) if isinstance(call.output, (tuple, list)) else weight


@rule("_trilinear")
def bilinear(call: Call) -> Labels:
    """Three factors, spread by the dimensions `expand1`, `expand2`, `expand3`, multiplied and summed over `sumdim`."""
    operands = []
    for i in "123":
        operand = operand_of(call[f"i{i}"], call[f"i{i}"].ndim)
        for axis in sorted(call[f"expand{i}"]):
            operand = insert(operand, axis)
        operands.append(operand)
    mark_roles(call, call.labels("i2"), {0: "out", 1: "in", 2: "in"})
    arrays = call.relations.reduce(call.relations.join(operands), call["sumdim"])
    return Labels(tuple(a.reshape([n for i, n in enumerate(a.shape) if i not in call["sumdim"]]) for a in arrays))
