"""Rules of the operators that compute: contractions, normalisations, reductions, pooling.

Every contraction is one pattern: lay the operands out in a common index space, join their components there, record the
cost of that space, and reduce the contracted dimensions away.
"""

from __future__ import annotations

import numpy as np

from secateur.graph.labels import Ints, Labels, Shape, align_right, varying
from secateur.graph.network import Role
from secateur.graph.relations import Operand
from secateur.graph.rules import Call, elementwise, hold_positions, labels_of, operand_of, rule
from secateur.graph.rules_shape import FIXED_POSITION, FIXED_SIZE
from secateur.graph.sizes import RawExtent

KERNEL = "kernel position of a convolution"


def _contract(call: Call, operands: list[Operand], shape: Shape, gone: list[int]) -> tuple[Ints, ...]:
    """Returns the components, still of the rank of `shape`, after the dimensions `gone` have been summed over."""
    joined = call.relations.join(operands)
    call.relations.cost(joined, shape)
    return call.relations.reduce(joined, gone)


def _insert(operand: Operand, axis: int) -> Operand:
    """Returns the operand with a dimension of size 1 at `axis`."""
    shape = list(operand.shape)
    shape.insert(axis, 1)
    return Operand(tuple(np.expand_dims(a, axis) for a in operand.arrays), tuple(shape))


def _squeeze(arrays: tuple[Ints, ...], axis: int) -> tuple[Ints, ...]:
    return tuple(a.squeeze(axis) for a in arrays)


def _mark(call: Call, weight: Labels, roles: dict[int, Role]) -> None:
    """Notes the role of each dimension of a weight, if the operand is one."""
    if weight.is_parameter:
        for array in weight.arrays:
            for axis in varying(array):
                if axis in roles and len(varying(array)) == 1:
                    call.mark_role(array, roles[axis])


def _with_bias(call: Call, arrays: tuple[Ints, ...], shape: Shape, axis: int) -> tuple[Ints, ...]:
    """Returns the components after a bias has been added along dimension `axis` of a tensor of `shape`."""
    bias = call["bias"]
    if bias is None:
        return arrays
    here = [bias.numel() if i == axis else 1 for i in range(len(shape))]
    operand = Operand(tuple(a.reshape(here) for a in labels_of(bias).arrays), tuple(here))
    return call.relations.join([Operand(arrays, shape), operand])


def _weight_scale(call: Call, weight_axis: int, rank: int, axis: int) -> tuple[Ints, ...] | None:
    """Returns the label arrays of weight and bias rows, as components of the output, for `Labels.scale`."""
    parts = [(call.labels("weight"), weight_axis)]
    if call["bias"] is not None:
        parts.append((call.labels("bias"), 0))
    found: list[Ints] = []
    for labels, source_axis in parts:
        rows = [a for a in labels.scale or () if varying(a) == {source_axis}]
        if not rows:
            return None
        found += [a.reshape([-1 if i == axis else 1 for i in range(rank)]) for a in rows]
    return tuple(found)


@rule("linear")
def linear(call: Call) -> Labels:
    """x [..., K], weight [N, K], bias [N]; index space [..., K, N]."""
    rank = call["input"].ndim
    x = _insert(operand_of(call["input"], rank), rank)
    weight = call["weight"]
    if weight.ndim == 1:
        weight_operand = _insert(operand_of(weight, rank), rank)
    else:
        arrays = tuple(align_right(a.T, rank + 1) for a in labels_of(weight).arrays)
        weight_operand = Operand(arrays, (1,) * (rank - 1) + tuple(weight.shape[::-1]))
    _mark(call, labels_of(weight), {0: "out", 1: "in"})
    shape = (*call.shape("input"), weight_operand.shape[-1])
    arrays = _squeeze(_contract(call, [x, weight_operand], shape, [rank - 1]), rank - 1)
    if weight.ndim == 1:
        return Labels(_squeeze(arrays, rank - 1))
    arrays = _with_bias(call, arrays, tuple(call.output.shape), rank - 1)
    return Labels(arrays, _weight_scale(call, 0, rank, rank - 1))


@rule("matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm")
def matmul(call: Call) -> Labels:
    """a [..., M, K] @ b [..., K, N] (+ self); index space [..., M, K, N]."""
    names = {
        "addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"),
        "mm": ("self", "mat2"),
        "bmm": ("self", "mat2"),
    }
    left, right = names.get(
        call.name, ("self", next(n for n in ("other", "vec", "tensor", "mat2") if call[n] is not None))
    )
    a, b = call[left], call[right]
    rank = max(a.ndim, b.ndim, 2) + 1
    a_operand = operand_of(a, rank - 1)
    b_operand = operand_of(b, rank - 1) if b.ndim > 1 else _insert(operand_of(b, rank - 2), rank - 2)
    a_operand, b_operand = _insert(a_operand, rank - 1), _insert(b_operand, rank - 3)
    _mark(call, labels_of(b), {b.ndim - 1: "out", b.ndim - 2: "in"} if b.ndim > 1 else {0: "in"})
    _mark(call, labels_of(a), {a.ndim - 2: "out", a.ndim - 1: "in"} if a.ndim > 1 else {0: "in"})
    shape = tuple(int(n) for n in np.maximum(a_operand.shape, b_operand.shape))
    arrays = _squeeze(_contract(call, [a_operand, b_operand], shape, [rank - 2]), rank - 2)
    if a.ndim == 1:
        arrays = _squeeze(arrays, rank - 3)
    if b.ndim == 1:
        arrays = _squeeze(arrays, -1)
    if call.name in ("addmm", "baddbmm"):
        out = call.output
        arrays = call.relations.join([Operand(arrays, tuple(out.shape)), operand_of(call["self"], out.ndim)])
    return Labels(arrays)


@rule("einsum")
def einsum(call: Call) -> Labels | None:
    """Two operands whose subscripts are plain letters; the index space has one dimension for each letter."""
    left, arrow, result = call["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or not arrow or not all(t.isalpha() and len(set(t)) == len(t) for t in terms):
        return None
    letters = sorted(set(left) - {","})
    sizes: dict[str, int] = {}
    operands = []
    for term, tensor in zip(terms, call["tensors"], strict=True):
        sizes |= {k: max(n, sizes.get(k, 1)) for k, n in zip(term, tensor.shape, strict=True)}
        order = sorted(range(len(term)), key=lambda i, t=term: letters.index(t[i]))
        place = [term.find(k) for k in letters]
        _mark(call, labels_of(tensor), {i: "out" if k in result else "in" for i, k in enumerate(term)})

        def lay_out(a: Ints, order: list[int] = order, place: list[int] = place) -> Ints:
            return a.transpose(order).reshape([a.shape[i] if i >= 0 else 1 for i in place])

        shape = tuple(tensor.shape[i] if i >= 0 else 1 for i in place)
        operands.append(Operand(tuple(lay_out(a) for a in labels_of(tensor).arrays), shape))
    gone = [i for i, k in enumerate(letters) if k not in result]
    arrays = _contract(call, operands, tuple(sizes[k] for k in letters), gone)
    kept = [letters.index(k) for k in result]
    return Labels(tuple(a.transpose([*kept, *gone]).reshape([a.shape[i] for i in kept]) for a in arrays))


@rule("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(call: Call) -> Labels:
    """x [B, I, s…], weight [O, I/groups, k…] (transposed: [I, O/groups, k…]); index space [B, O, I/groups, s…, k…].

    The dimensions s are those of the output, or of the input of a transposed convolution: each pairs with each k.
    """
    x, weight = call["input"], call["weight"]
    transposed = bool(call["transposed"]) or "transpose" in call.name
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    for name, tensor in (("input", x), ("weight", weight)):
        for array in labels_of(tensor).arrays:
            if any(array.shape[i] > 1 for i in range(2, tensor.ndim)):
                call.relations.freeze(array, KERNEL if name == "weight" else "runs along a dimension of a convolution")
    _mark(call, labels_of(weight), {out_axis: "out", in_axis: "in"})
    channels = [a.ravel() for a in labels_of(x).arrays if varying(a) == {1}]
    batch = [a.ravel() for a in labels_of(x).arrays if varying(a) == {0}]
    w_out = [a.ravel() for a in labels_of(weight).arrays if varying(a) == {out_axis}]
    w_in = [a.ravel() for a in labels_of(weight).arrays if varying(a) == {in_axis}]
    groups = int(call["groups"] or 1)
    out = call.output
    if groups > 1:
        if transposed:
            for array in (*channels, *w_out, *w_in):
                call.relations.freeze(array, "grouped transposed convolution")
            out_labels = []
        else:
            out_labels = _grouped(call, channels, w_out, w_in, groups)
            w_in = [a for a in w_in if a.size > 1]
    else:
        _meet(call, channels, w_in, x.shape[1])
        out_labels = w_out
    space = (x if transposed else out).shape[2:]
    positions = int(np.prod([*space, *weight.shape[2:]], dtype=np.int64))
    per_group = int(weight.shape[in_axis]) // (groups if transposed else 1)
    factors = [batch, w_out if not groups > 1 else out_labels, w_in if not transposed or groups == 1 else []]
    plain = [out.shape[0], out.shape[1], per_group]
    coefficient = positions * int(np.prod([n for n, f in zip(plain, factors, strict=True) if not f], dtype=np.int64))
    call.relations.costs.append((coefficient, tuple(f[0] for f in factors if f)))
    arrays = [a.reshape([-1] + [1] * (out.ndim - 1)) for a in batch]
    arrays += [a.reshape([1, -1] + [1] * (out.ndim - 2)) for a in out_labels]
    scale = _weight_scale(call, out_axis, out.ndim, 1) if groups == 1 else None
    return Labels(_with_bias(call, tuple(arrays), tuple(out.shape), 1), scale)


def _meet(call: Call, a: list[Ints], b: list[Ints], size: int) -> None:
    """Two sides of a contraction meet, each with at most one component along it."""
    sides = [Operand(tuple(s), (size,)) for s in (a, b)]
    call.relations.join(sides)


def _grouped(call: Call, channels: list[Ints], w_out: list[Ints], w_in: list[Ints], groups: int) -> list[Ints]:
    """Relations of a grouped convolution; returns the labels of its output channels."""
    relations = call.relations
    inputs, outputs = call.shape("input")[1], int(call["weight"].shape[0])
    if len(channels) != 1 or len(w_out) != 1:
        for array in (*channels, *w_out, *w_in):
            relations.freeze(array, "grouped convolution over channels that are not labelled")
        return w_out
    x, out = channels[0], w_out[0]
    if inputs == groups == outputs:
        relations.tie(x, out)
        spec = call.expressions([groups])[0]
        if not relations.bind(spec, RawExtent(x[None], "count")):
            relations.freeze(x, FIXED_SIZE)
        return [out]
    if inputs == groups:
        relations.freeze(x, "a grouped convolution has one input channel in each group")
    rows = x.reshape(groups, -1)
    if w_in:
        rows = np.concatenate([rows, w_in[0][None]])
    relations.bundle(rows.T)
    if outputs == groups:
        relations.freeze(out, "a grouped convolution has one output channel in each group")
    else:
        relations.add_fibres(out.reshape(groups, -1))
    return [out]


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
    sides = [_insert(q_operand, rank - 2), _insert(k_operand, rank - 3)]
    scores = _contract(call, sides, (*batch, queries, keys, width), [rank - 1])
    scores = _squeeze(scores, rank - 1)
    if call["attn_mask"] is not None:
        shape = (*batch, queries, keys)
        scores = relations.join([Operand(scores, shape), operand_of(call["attn_mask"], q.ndim)])
    sides = [_insert(Operand(scores, (*batch, queries, keys)), rank - 1), _insert(v_operand, rank - 3)]
    mixed = _contract(call, sides, (*batch, queries, keys, value_width), [rank - 2])
    return Labels(_squeeze(mixed, rank - 2))


def _keep_temperature(call: Call, q: Operand, rank: int) -> None:
    """The operator divides by sqrt(D) of the cut tensor: remember which weights can make up for it."""
    weights = call.labels("query").scale
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
                extent = call.relations.extent(array, axis)
                if not call.relations.bind(spec, extent):
                    call.relations.freeze(array, FIXED_SIZE, channel_only=extent.kind == "width")
    arrays = _affine(call, call.labels("input").arrays, tuple(x.shape), axes)
    return Labels(arrays, _affine_scale(call, x.ndim, axes))


@rule("batch_norm", "native_batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(call: Call) -> Labels:
    x = call["input"]
    return Labels(_affine(call, call.labels("input").arrays, tuple(x.shape), [1]), _affine_scale(call, x.ndim, [1]))


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
            if not call.relations.bind(call.expressions([groups])[0], RawExtent(array.reshape(1, -1), "count")):
                call.relations.freeze(array, FIXED_SIZE)
        else:
            call.relations.add_fibres(array.reshape(groups, -1))
    return Labels(_affine(call, call.labels("input").arrays, tuple(x.shape), [1]), _affine_scale(call, x.ndim, [1]))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "logcumsumexp", "softmin")
def along(call: Call) -> Labels:
    """Computed along a dimension over whatever survives there."""
    return call.labels("self").map(lambda a: a)


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
                hold_positions(call.relations, array, axis, FIXED_POSITION)
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
    name = "self" if call["self"] is not None else "input"
    first = 2 if call[name].ndim > 2 else 1
    labels = call.labels(name)
    for array in labels.arrays:
        if any(i >= first for i in varying(array)):
            call.relations.freeze(array, "pooled or resized along a labelled dimension")
    passing = Labels(
        tuple(a for a in labels.arrays if not any(i >= first for i in varying(a))), None, labels.is_parameter
    )
    return passing if not isinstance(call.output, (tuple, list)) else (passing,) * len(call.output)


@rule(
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "sym_size", "sym_numel", "arange", "linspace"
)
def fresh(call: Call) -> Labels:
    """A tensor of its own: only the type and device of `self` are read."""
    return Labels()


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
def like(call: Call) -> Labels:
    return call.labels("self").map(lambda a: a)


@rule("topk", "sort", "argsort")
def ordering(call: Call) -> tuple[Labels, ...] | Labels:
    axis = call.axis() if call["self"].ndim else 0
    labels = call.labels("self")
    for array in labels.arrays:
        if array.shape[axis] > 1:
            hold_positions(call.relations, array, axis, "sorted")
    passing = Labels(tuple(a for a in labels.arrays if a.shape[axis] == 1))
    return passing if not isinstance(call.output, (tuple, list)) else (passing,) * len(call.output)
