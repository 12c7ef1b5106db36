"""Residual branches: the sums x + f(x) of a trace, what f is made of, and what has to be replaced to leave x.

A branch is what nothing but its sum reads. It is dropped by putting stand-ins in the places of the modules inside it:
the one that makes f(x) gives zeros, the others what they are given. Where that would not do, because the block itself
computes in the branch, say, the branch stays, with a reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from torch import nn

from secateur.graph.calls import NO_STRUCTURE, ModuleCall
from secateur.graph.network import Block, Residual, StandIn
from secateur.graph.tracer import Sum, Trace

NO_IDENTITY = "both sides of its sum compute something: without either of them, the sum would not be what came in"
READ_ELSEWHERE = "what it computes is read by more than its sum"
NO_MODULE = "its sum takes what the block's own code computes, not what a module does"
OWN_CODE = "outside of the modules that serve it alone, it multiplies in {}"
SHARED = "its modules share weights with others: {}"
SHAPE = "{} returns another shape than it takes, and the block's own code takes it apart or writes into it"
STRUCTURE = "{} returns something else than a tensor, or a tuple of tensors"
FUSED = "torch's encoder layer reads the weights of its modules behind their backs"

ZEROS_STAY_ZEROS = frozenset(
    (
        *("mul", "neg", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t"),
        *("squeeze", "unsqueeze", "slice", "select", "roll", "expand", "clone", "contiguous", "alias", "detach"),
        *("to", "_to_copy", "dropout"),
    )
)
"""Operators, by the names of torch's schema, that make zeros of zeros."""


ANY_SIZE = frozenset(("mul", "neg", "permute", "transpose", "clone", "contiguous", "alias", "detach", "to", "dropout"))
"""Those of them that do so whatever the sizes are."""

BY_SIZE = frozenset(
    (
        *("split", "split_with_sizes", "chunk", "unbind", "narrow", "slice", "select", "index", "cat", "stack"),
        *("view", "reshape", "_unsafe_view", "unflatten", "expand", "roll", "unfold"),
    )
)
"""Operators whose arguments fit one size of what they are given."""

ORDER_STAYS = frozenset(("view", "reshape", "_unsafe_view", "flatten", "unflatten"))
"""Operators that change nothing but the shape."""

FRESH = ("new_", "zeros", "ones", "full", "empty")
"""How the names of operators begin that make a tensor of its own: nothing else can be seen through it."""


class _Flow:
    """A trace as a graph: which operations read the result of which, and in which calls of modules they ran."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.readers: list[list[int]] = [[] for _ in trace.edges]
        for node, inputs in enumerate(trace.edges):
            for i in inputs:
                if i >= 0:
                    self.readers[i].append(node)
        self._lost: set[int] = set()  # operations that end in writing a constant into a part of what they were given
        for node in range(len(trace.edges) - 1, -1, -1):
            alone = len(trace.edges[node]) == 1 and node not in trace.last
            if alone and self._lost.issuperset(self.readers[node]):
                self._lost.add(node)
        self.calls: dict[str, list[ModuleCall]] = {}
        for call in trace.calls:
            if call.stop > call.start:
                self.calls.setdefault(call.path, []).append(call)

    def is_made_from(self, node: int, source: int) -> bool:
        """Whether `node` is computed from the result of `source`."""
        pending, seen = [node], {node}
        while pending:
            for i in self.trace.edges[pending.pop()]:
                if i == source:
                    return True
                if i > source and i not in seen:
                    seen.add(i)
                    pending.append(i)
        return False

    def only_for(self, tip: int, end: int) -> set[int]:
        """Returns the operations that nothing would read if `end` did not read `tip`."""
        found: set[int] = set()
        pending, seen = [-tip], {tip}
        while pending:  # the last ones first: whatever reads a result has been looked at before what made it
            node = -heappop(pending)
            written = self._written_to(node)
            others = (r for r in self.readers[node] if r not in found and r not in written and (node, r) != (tip, end))
            if node not in self.trace.last and next(others, None) is None:
                found |= {node, *written}
                for i in self.trace.edges[node]:
                    if i >= 0 and i not in seen:
                        seen.add(i)
                        heappush(pending, -i)
        return found

    def _written_to(self, node: int) -> set[int]:
        """Returns the operations that only write constants into parts of a tensor of its own, made by `node`."""
        written: set[int] = set()
        pending = [node] if self.trace.operators[node].startswith(FRESH) else []
        while pending:
            found = self._lost.intersection(self.readers[pending.pop()])
            written |= found
            pending += found
        return written

    def modules_within(self, nodes: set[int]) -> list[str]:
        """Returns the outermost modules all of whose operations, in all their calls, are among `nodes`."""
        running = dict.fromkeys(self.trace.modules[n] for n in sorted(nodes))
        paths = dict.fromkeys(p for path in running for p in (path, *around(path)) if p in self.calls)
        inside = {p for p in paths if all(nodes.issuperset(range(c.start, c.stop)) for c in self.calls[p])}
        return [p for p in paths if p in inside and inside.isdisjoint(around(p))]


@dataclass(frozen=True)
class _Branch:
    """A branch: its sum, the operations that made its result and came in, all operations inside it, its modules."""

    sum: Sum
    tip: int
    trunk: int
    nodes: set[int]
    modules: tuple[str, ...]


class _Weights:
    """How many parameters lie in each module, and which tensors are known by several names."""

    def __init__(self, model: nn.Module) -> None:
        self.sizes: Counter[str] = Counter()
        for name, parameter in model.named_parameters():
            for path in (name, *around(name)):
                self.sizes[path] += parameter.numel()
        names: dict[int, list[str]] = {}
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:
            names.setdefault(id(tensor), []).append(name)
        self._alike = [n for n in names.values() if len(n) > 1]

    def within(self, modules: Iterable[str]) -> int:
        """Returns the number of parameters in some modules, none of which lies in another."""
        return sum(self.sizes[m] for m in modules)

    def shared(self, modules: Collection[str]) -> list[str]:
        """Returns the parameters and buffers inside of `modules` that others hold as well."""
        return [n[0] for n in self._alike if len({is_inside(name, modules) for name in n}) > 1]


def residuals(model: nn.Module, trace: Trace, batch: int) -> tuple[tuple[Residual, ...], tuple[Block, ...]]:
    """Returns the residual branches of a trace, and the blocks that do nothing without theirs.

    `batch` is the number of examples that the trace ran on.
    """
    flow = _Flow(trace)
    branches = [b for s in trace.sums for b in _branch(flow, s)]
    weights = _Weights(model)
    found: list[Residual] = []
    for b, name in zip(branches, _names(branches, weights), strict=True):
        fused = isinstance(model.get_submodule(b.sum.where), nn.TransformerEncoderLayer)
        stand_ins, reason = ((), FUSED) if fused else _stand_ins(flow, weights, b)
        inner = sorted({trace.modules[i] for i in b.nodes} - {b.sum.where, ""})
        macs = sum(cost for node, cost in _costs(trace, b.nodes) if is_inside(trace.modules[node], b.modules)) // batch
        found.append(Residual(b.sum.where, tuple(inner), name, stand_ins, weights.within(b.modules), macs, reason))
    blocks = tuple(_blocks(flow, weights, branches, found))
    alone = {b.branches: weights.sizes[b.module] for b in blocks}
    # a branch that is all that its block does takes along what the block holds itself
    return tuple(replace(r, params=alone.get((r.name,), r.params)) for r in found), blocks


def is_inside(path: str, modules: Collection[str]) -> bool:
    """Whether a module or tensor is one of `modules`, or lies in one of them."""
    return path in modules or any(p in modules for p in around(path))


def around(path: str) -> Iterator[str]:
    """Yields the paths of the modules around a module or tensor, from the inside out."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _branch(flow: _Flow, total: Sum) -> Iterator[_Branch]:
    """Yields the branch of a residual sum, with a `trunk` of -1 where the skip computes as well; else nothing."""
    for trunk, tip in ((total.left, total.right), (total.right, total.left)):
        if trunk < tip and len(flow.readers[trunk]) > 1 and flow.is_made_from(tip, trunk):
            nodes = flow.only_for(tip, total.node)
            if any(flow.trace.modules[i] != total.where for i in nodes or (tip,)):
                yield _Branch(total, tip, trunk, nodes, tuple(flow.modules_within(nodes)))
            return
    sides = [flow.only_for(tip, total.node) for tip in (total.left, total.right)]
    sources = [{i for n in side for i in flow.trace.edges[n] if i >= 0} - side for side in sides]
    modules = [flow.modules_within(side) for side in sides]
    deeper = len({len(list(_costs(flow.trace, side))) for side in sides}) == 2  # two layers side by side are no skip
    if total.where and deeper and all(modules) and sources[0] == sources[1] and len(sources[0]) == 1:
        yield _Branch(total, total.left, -1, sides[0], tuple(modules[0]))


def _names(branches: Sequence[_Branch], weights: _Weights) -> Iterator[str]:
    """Yields the names: the block if it holds this branch and no other, otherwise the largest module in the branch.

    A block that is part of a branch gives its name to that one.
    """
    sums = Counter(path for b in branches for path in (b.sum.where, *around(b.sum.where)))
    parts = {m for b in branches for m in b.modules}
    taken: Counter[str] = Counter()
    for branch in branches:
        where, modules = branch.sum.where, branch.modules
        alone = where != "" and sums[where] == 1 and where not in parts
        if not modules or (alone and all(is_inside(m, (where,)) for m in modules)):
            name = where or "the model"
        else:
            name = max(modules, key=weights.sizes.__getitem__)
        taken[name] += 1
        yield name if taken[name] == 1 else f"{name}#{taken[name]}"


def _costs(trace: Trace, nodes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yields those of `nodes` that cost something, with their multiply-accumulates."""
    for node in nodes:
        first = trace.num_costs[node - 1] if node else 0
        for coefficient, extents in trace.relations.costs[first : trace.num_costs[node]]:
            yield node, coefficient * math.prod(e.traced_size for e in extents)


def _stand_ins(flow: _Flow, weights: _Weights, branch: _Branch) -> tuple[tuple[StandIn, ...], str]:
    """Returns what stands in for the modules of a branch that is dropped; or nothing, and why it cannot be."""
    trace = flow.trace
    if branch.trunk < 0:
        return (), NO_IDENTITY
    if not branch.nodes:
        return (), READ_ELSEWHERE
    calls = [c for path in branch.modules for c in flow.calls[path]]
    maker, behind = _maker(flow, branch, calls)
    if maker is None:
        return (), NO_MODULE
    own = {n for n in branch.nodes if not is_inside(trace.modules[n], branch.modules)}
    computing = sorted({trace.modules[n] or "the model" for n, _ in _costs(trace, own)})
    if computing:
        return (), OWN_CODE.format(", ".join(computing))
    shared = weights.shared(branch.modules)
    if shared:
        return (), SHARED.format(", ".join(shared))
    unknown = [c.path for c in calls if c.length == NO_STRUCTURE]
    if unknown:
        return (), STRUCTURE.format(unknown[0])
    into_tip = trace.operators[branch.sum.node].endswith("_") and branch.sum.left == branch.tip
    by_size = not BY_SIZE.isdisjoint(trace.operators[n] for n in own)
    spread = not ANY_SIZE.issuperset(behind)
    misfit = [c.path for c in calls if not c.keeps_shape and (spread if c is maker else by_size)]
    if misfit:
        return (), SHAPE.format(misfit[0])
    written = any(trace.operators[n].endswith("_") for n in own)
    result = []
    for call in {c.path: c for c in calls}.values():
        if call.path == maker.path:
            result.append(StandIn(call.path, "zeros" if into_tip or spread else "zero", call.length, maker.rank))
        else:
            anew = written and _comes_from_outside(flow, branch, own, call.given)
            result.append(StandIn(call.path, "zeros" if anew else "pass", call.length))
    return tuple(result), ""


def _maker(flow: _Flow, branch: _Branch, calls: Sequence[ModuleCall]) -> tuple[ModuleCall | None, list[str]]:
    """Returns the call whose result is the branch's, or becomes it by operators that leave zeros as they are.

    And these operators, by name, among them some that take part in something else.
    """
    pending = [branch.tip]
    behind: list[str] = []
    by_result = {c.result: c for c in calls}
    while pending:
        node = pending.pop()
        if node in by_result:
            return by_result[node], behind
        operator = flow.trace.operators[node]
        behind.append(operator)
        inputs = [i for i in flow.trace.edges[node] if i in branch.nodes]
        if operator.rstrip("_") in ZEROS_STAY_ZEROS and (operator.rstrip("_") == "mul" or len(inputs) == 1):
            pending += inputs
    return None, behind


def _comes_from_outside(flow: _Flow, branch: _Branch, own: set[int], node: int) -> bool:
    """Whether a result may be a view of something outside of the branch, once its modules pass on what they get."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current not in branch.nodes:
            return True
        if current in own:
            pending += (i for i in flow.trace.edges[current] if i not in seen)
            seen.update(flow.trace.edges[current])
    return False


def _blocks(flow: _Flow, weights: _Weights, branches: Sequence[_Branch], found: Sequence[Residual]) -> Iterator[Block]:
    """Yields the modules that return what they are given once all their branches are dropped."""
    by_sum = {b.sum.node: (b, r) for b, r in zip(branches, found, strict=True) if not r.reason}
    wheres = {b.sum.where for b, _ in by_sum.values()} - {""}
    for where, (first, *others) in flow.calls.items():
        if where not in wheres or others or first.length not in (0, 1) or first.given < 0:
            continue
        node, nodes, names = first.result, set[int](), []
        while node >= first.start and (node in by_sum or flow.trace.operators[node] in ORDER_STAYS):
            nodes.add(node)
            if node in by_sum:
                branch, residual = by_sum[node]
                nodes |= branch.nodes
                names.append(residual.name)
                node = branch.trunk
            else:
                node = flow.trace.edges[node][0]
        complete = node == first.given and first.keeps_shape and nodes.issuperset(range(first.start, first.stop))
        if complete and not _is_overwritten(flow, first) and not weights.shared((where,)):
            yield Block(where, tuple(reversed(names)), first.length)


def _is_overwritten(flow: _Flow, call: ModuleCall) -> bool:
    """Whether the result of a call is written to, while others than the module read what it was given."""
    shared = any(not call.start <= r < call.stop for r in flow.readers[call.given])
    return shared and any(flow.trace.operators[r].endswith("_") for r in flow.readers[call.result])
