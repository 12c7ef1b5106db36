"""Runs a model once on the meta device, with labels on every tensor. The model itself is never touched.

The run happens on a *skeleton*: a deep copy whose tensors live on `meta`, so that a model of any size is copied in
milliseconds and nothing of the user's can be disturbed. Below autograd torch hands over operators before it decomposes
them (`linear`, `layer_norm`, `scaled_dot_product_attention`), which keeps rules few and the run short. (Inference mode
would do the same, but a tensor that the model's library caches during the run could then never be trained with.)
"""

from __future__ import annotations

import math
import sys
import types
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import TraceError
from secateur.graph import rules_compute, rules_conv, rules_index, rules_shape  # noqa: F401  (they fill the registry)
from secateur.graph.calls import ModuleCall, module_calls
from secateur.graph.copies import as_arguments, as_type, output_tensors
from secateur.graph.labels import Ints, Labels, attach, detach, labels_of, leaves, named_tensors, tensors_in, varying
from secateur.graph.meta import MetaKernels
from secateur.graph.network import Role
from secateur.graph.relations import Relations
from secateur.graph.rules import RULES, Call, elementwise
from secateur.graph.sizes import TORCH, Power, Size, as_float, followed_roots, install
from secateur.graph.values import Values, is_deciding, positions

_HERE = __file__.rsplit("/", 2)[0] + "/"


Shapes = tuple[tuple[int, ...], ...]
OUTPUT = "output of the model"


@dataclass(frozen=True, eq=False)
class Sum:
    """A sum of two tensors of one shape: its number as an operation, those that made the two, its module."""

    node: int
    left: int
    right: int
    where: str
    arrays: tuple[Ints, ...]


class Trace:
    """The record of one run: relations of labels, and which label belongs to which index of which tensor.

    Operations are numbered in the order in which they ran. Of each, `edges` has the operations that made its inputs,
    `operators` its name, `modules` the module whose code it is, `num_costs` how many costs were known when it was done.
    `last` are the operations that made the outputs of the model.
    """

    def __init__(self, values: Values | None = None) -> None:
        self.values = values
        self.relations = Relations(self.where)
        self.axes: list[tuple[str, int, Ints]] = []
        self.roles: dict[int, Role] = {}
        self.path: list[str] = []
        self.edges: list[tuple[int, ...]] = []
        self.operators: list[str] = []
        self.num_costs: list[int] = []
        self.modules: list[str] = []
        self.calls: list[ModuleCall] = []
        self.sums: list[Sum] = []
        self.unknown: dict[str, str] = {}
        self.output_shapes: Shapes = ()
        self.last: set[int] = set()
        self.touched: set[int] = set()
        self.notes: list[str] = []
        self._labelled: list[weakref.ref[torch.Tensor]] = []

    def attach(self, tensor: torch.Tensor, labels: Labels) -> None:
        """Makes `tensor` carry `labels` until the trace ends."""
        self._labelled.append(weakref.ref(tensor))
        attach(tensor, labels)

    def close(self) -> None:
        """Takes the labels off all tensors: a library may have cached one of them, and another trace would find it."""
        for reference in self._labelled:
            tensor = reference()
            if tensor is not None:
                detach(tensor)

    def where(self) -> str:
        """Returns the module path and source line of the user's code that is running."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if not name.startswith((_HERE, TORCH, "<")):
                break
            frame = frame.f_back
        module = self.path[-1] if self.path and self.path[-1] else "the model"
        if frame is None or not self.path:
            return module
        return f"{module} ({'/'.join(frame.f_code.co_filename.split('/')[-3:])}:{frame.f_lineno})"

    def label(self, name: str, tensor: torch.Tensor, dims: int | None = None) -> None:
        """Gives every index along every one of the first `dims` dimensions of a parameter or buffer a label."""
        if not tensor.is_floating_point():
            return
        arrays = []
        for dim, size in enumerate(tensor.shape[:dims]):
            if size > 1:
                labels = self.relations.new_labels(size)
                self.axes.append((name, dim, labels))
                arrays.append(labels.reshape([-1 if i == dim else 1 for i in range(tensor.ndim)]))
        self.attach(tensor, Labels(tuple(arrays), tuple(arrays[:1]), True))

    def mark_role(self, array: Ints, role: Role) -> None:
        """Notes what the labels of `array` do in a weight."""
        first = int(array.ravel()[0])
        self.roles.setdefault(first, role)


class _Functions(TorchFunctionMode):
    """Sees calls before torch turns integer subclasses into plain integers."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.integers: tuple[int, ...] = ()
        self._opened: dict[Any, Any] = {}
        self._inside: list[Any] = []

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is torch.Tensor.shape:
            return torch.Size(self._sizes(args[0]))
        if func is torch.Tensor.size:
            sizes = self._sizes(args[0])
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return torch.Size(sizes) if dim is None else sizes[dim]
        if func is torch.Tensor.numel or func is torch.numel:
            return math.prod(self._sizes(args[0]))
        opens = isinstance(func, types.FunctionType) and func.__globals__.get("__name__") in _OPENED
        if opens and func not in self._inside:
            self._inside.append(func)
            try:
                with self:
                    return self._open(func)(*args, **kwargs)
            finally:
                self._inside.pop()
        if self.trace.values is not None and func in _READS:
            return self.trace.values.decide(func.__name__, lambda: func(*args, **kwargs))
        found = leaves((args, kwargs))
        self.integers = tuple(x for x in found if isinstance(x, int) and not isinstance(x, bool))
        self._note_numbers(func.__name__, args, kwargs, [x for x in found if isinstance(x, Power)])
        return func(*args, **kwargs)

    def _note_numbers(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], powers: list[Power]) -> None:
        """Notes sizes that go into the call as numbers, not as shapes."""
        relations = self.trace.relations
        if name in _ARITHMETIC:
            for size in self.integers:
                if isinstance(size, Size):
                    relations.number(size.expression)
        for power in powers:
            scales = (len(args) == 2 and args[1] is power) or name == "scaled_dot_product_attention"
            weights = labels_of(args[0] if args else kwargs.get("query")).scaling if scales else ()
            if weights and name in _SCALES:
                relations.power(power.base.expression, _SCALES[name] * power.exponent, weights)
            else:
                power.plain()

    def _sizes(self, tensor: torch.Tensor) -> list[int]:
        """Returns the shape, with an expression where a dimension is labelled."""
        with torch._C.DisableTorchFunction():
            sizes = list(tensor.shape)
        for array in labels_of(tensor).arrays:
            for axis in varying(array):
                extent = self.trace.relations.extent(array, axis)
                sizes[axis] = Size(sizes[axis], extent, self.trace.relations)
        return sizes

    def _open(self, func: types.FunctionType) -> Any:
        """Returns `func`, written in Python, as a function that does not ask for overrides: its inside is seen too."""
        if func not in self._opened:
            never = {n: _never for n in func.__globals__ if n.startswith("has_torch_function")}
            opened = types.FunctionType(
                func.__code__,
                {**func.__globals__, **never, "float": as_float},
                func.__name__,
                func.__defaults__,
                func.__closure__,
            )
            opened.__kwdefaults__ = func.__kwdefaults__
            self._opened[func] = opened
        return self._opened[func]


_READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)
_SCALES = {"mul": 1.0, "__rmul__": 1.0, "div": -1.0, "true_divide": -1.0, "__truediv__": -1.0}
_SCALES["scaled_dot_product_attention"] = 1.0
_ARITHMETIC = {
    "mul",
    "div",
    "add",
    "sub",
    "rsub",
    "pow",
    "true_divide",
    "multiply",
    "divide",
    "__rpow__",
    "__rtruediv__",
}
_ARITHMETIC |= {"tensor", "as_tensor", "scalar_tensor"}
_ARITHMETIC |= {f"{name}_" for name in ("mul", "div", "add", "sub", "pow")}
_OPENED = ("torch.nn.functional", "torch.functional")


def _never(*_: object) -> bool:
    return False


class _Operators(TorchDispatchMode):
    """Applies the rule of each operator that runs."""

    def __init__(self, trace: Trace, functions: _Functions) -> None:
        super().__init__()
        self.trace = trace
        self.functions = functions
        self._depth = 0
        self._kernels = MetaKernels()
        self._schemas: dict[Any, tuple[list[str], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
        pointwise = torch.Tag.pointwise in func.tags
        if base not in RULES and not pointwise and func._can_decompose():
            return self._decompose(func, args, kwargs)
        values = self.trace.values
        if values is None:
            output = self._kernels.run(func, args, kwargs)
        elif func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_"):
            output = func(args[0], positions(values, args[1]), *args[2:], **kwargs)
        elif is_deciding(func):
            output = values.decide(name, lambda: func(*args, **kwargs))
        else:
            output = func(*args, **kwargs)
        outputs = list(tensors_in(output))
        if not outputs:
            return output
        call = Call(
            base,
            self._arguments(func, args, kwargs),
            output,
            self.trace.relations,
            self.functions.integers,
            self.trace.mark_role,
            self._depth > 0,
        )
        inputs = list(tensors_in(call.arguments))
        self.trace.touched.update(id(t) for t in inputs if labels_of(t).is_parameter)
        labels = self._labels(call, inputs, base, pointwise)
        if labels is None:
            return self._decompose(func, args, kwargs)
        self._attach(call, inputs, outputs, labels, in_place=base != name)
        return output

    def _decompose(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs the operator as the simpler ones that torch makes of it, under this mode."""
        self._depth += 1
        try:
            with self:
                return func.decompose(*args, **kwargs)
        finally:
            self._depth -= 1

    def _arguments(self, func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        """Returns all arguments by name, defaults included."""
        if func not in self._schemas:
            arguments = func._schema.arguments
            self._schemas[func] = [a.name for a in arguments], {a.name: a.default_value for a in arguments}
        names, defaults = self._schemas[func]
        return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}

    def _labels(self, call: Call, inputs: list[torch.Tensor], base: str, pointwise: bool) -> tuple[Labels, ...] | None:
        if base in RULES:
            result = RULES[base](call)
            return (result,) if isinstance(result, Labels) else result
        if not any(labels_of(t).arrays for t in inputs):
            return ()
        if pointwise or base in _POINTWISE:
            return (elementwise(call),)
        self.trace.unknown[base] = self.trace.where()
        for tensor in inputs:
            for array in labels_of(tensor).arrays:
                self.trace.relations.freeze(array, f"no rule for the operator aten.{base}")
        return ()

    def _attach(
        self,
        call: Call,
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
        labels: Sequence[Labels],
        in_place: bool,
    ) -> None:
        trace = self.trace
        nodes = tuple(sorted({labels_of(t).node for t in inputs}))
        trace.edges.append(nodes)
        trace.operators.append(f"{call.name}_" if in_place else call.name)
        trace.num_costs.append(len(trace.relations.costs))
        trace.modules.append(trace.path[-1] if trace.path else "")
        node = len(trace.edges) - 1
        if call.name == "add" and len(inputs) == 2 and inputs[0].shape == inputs[1].shape:
            a, b = (labels_of(t).node for t in inputs)
            if a >= 0 and b >= 0 and labels and labels_of(inputs[0]).arrays and labels_of(inputs[1]).arrays:
                trace.sums.append(Sum(node, a, b, trace.modules[-1], labels[0].arrays))
        self._note_ends(inputs, labels)
        if in_place and call.name not in ("zero", "fill") and _is_part(outputs[0]):
            for array in (a for t in inputs for a in labels_of(t).arrays):
                trace.relations.freeze(array, f"written in place into a part of a tensor by aten.{call.name}_")
        for tensor, lab in zip(outputs, (*labels, *[Labels()] * len(outputs)), strict=False):
            trace.attach(tensor, replace(lab, node=node))

    def _note_ends(self, inputs: list[torch.Tensor], labels: Sequence[Labels]) -> None:
        """Notes which inputs the output does not scale with: there, a change of their weights has its effect."""
        outputs = [a for lab in labels for a in lab.scaling]
        product = any(lab.factor is not None for lab in labels)
        scaled = [s for s in (labels_of(t).scaling for t in inputs) if s]
        for number, scaling in enumerate(scaled):
            first = scaling[0].flat[0]
            # a product scales with one of its factors: with the same one twice, it would scale twice
            twice = product and number > 0
            # of one input alone, parts may have been taken
            if not outputs or twice or (len(scaled) > 1 and not any((a == first).any() for a in outputs)):
                self.trace.relations.ends += scaling


_POINTWISE = {
    "copy",
    "fill",
    "zero",
    "masked_fill",
    "bernoulli",
    "lerp",
    "hardtanh",
    "gelu",
    "hardswish",
    "hardsigmoid",
    "prelu",
    "rrelu",
    "_prelu_kernel",
    "glu_jvp",
}


def _is_part(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def run(model: nn.Module, inputs: Any, values: Values | None = None) -> Trace:
    """Runs a skeleton on labels and returns the record. `model` is used up: its integers are replaced.

    With `values`, `model` is a copy with weights, and runs on them instead of on `inputs`. Layers that the run does not
    reach are looked for in training mode, where auxiliary heads run: what they compute with belongs together too. They
    are not part of the cost.

    Raises TraceError, with the model's own error inside, when the model fails on these inputs.
    """
    trace = Trace(values)
    install(model, trace.relations)
    # the type does not matter to the analysis, but a model in half precision refuses single precision inputs
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    arguments = as_arguments(as_type(inputs if values is None else values.inputs, dtype))
    modules = list(model.modules())
    kernels = {id(m.weight) for m in modules if isinstance(m, nn.modules.conv._ConvNd)}
    for name, tensor in named_tensors(model).items():
        trace.label(name, tensor, 2 if id(tensor) in kernels else None)
    try:
        trace.output_shapes, trace.last = _forward(model, trace, arguments)
        unseen = any(id(m.weight) not in trace.touched for m in modules if isinstance(m, _LAYERS))
        if unseen and values is None:
            _visit_training_branches(model, trace, arguments)
    except Exception as error:
        at = f" in {trace.path[-1]!r}" if trace.path and trace.path[-1] else ""
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in(arguments))
        raise TraceError(
            f"the model ({type(model).__name__}) failed{at} on inputs of shape {shapes or 'none'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        trace.close()
    return trace


_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_BATCH_DEPENDENT = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


@contextmanager
def _meta_autocast() -> Iterator[None]:
    """Lets a model ask for `torch.autocast(x.device.type)`: there is none on `meta`, where nothing is computed."""
    usual = torch.autocast.__init__

    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        usual(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast.__init__ = init
    try:
        yield
    finally:
        torch.autocast.__init__ = usual


@contextmanager
def _without_stale_sizes() -> Iterator[None]:
    """Keeps the sizes of one run out of einops' caches, which outlive it."""
    einops = sys.modules.get("einops.einops")
    caches = [f for f in vars(einops).values() if hasattr(f, "cache_clear")] if einops else []
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


def _forward(
    model: nn.Module, trace: Trace, arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[Shapes, set[int]]:
    """Runs the model once on labels, freezes its outputs, and returns their shapes and what made them."""
    args, kwargs = arguments
    functions = _Functions(trace)
    mha_fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.no_grad(),
            torch._C._AutoDispatchBelowAutograd(),
            module_calls(model, trace.path, trace.edges, trace.calls),
            followed_roots(),
            _meta_autocast(),
            _without_stale_sizes(),
            _Operators(trace, functions),
            functions,
        ):
            output = model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(mha_fast_path)
    tensors = output_tensors(output)
    for tensor in tensors:
        for array in labels_of(tensor).arrays:
            trace.relations.freeze(array, OUTPUT)
    return tuple(tuple(t.shape) for t in tensors), {labels_of(t).node for t in tensors}


def _visit_training_branches(model: nn.Module, trace: Trace, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Runs the model once more as in training, except for what depends on the batch or on chance."""
    relations = trace.relations
    seen = (relations.costs, trace.sums, trace.calls, relations.scale_fixes, relations.powers, relations.ends)
    costs, sums, calls, fixes, powers, ends = map(len, seen)
    for module in model.modules():
        module.training = not isinstance(module, _BATCH_DEPENDENT)
    try:
        _forward(model, trace, arguments)
    except Exception as error:  # noqa: BLE001  (any error of the model: the analysis in eval mode stands)
        trace.path.clear()
        trace.notes.append(f"training mode could not be looked at: {type(error).__name__}: {error}")
    finally:
        del relations.costs[costs:], trace.sums[sums:], trace.calls[calls:], relations.ends[ends:]
        # what the first run came by as well must not be made up for twice
        known = {_key(rows) for rows, *_ in relations.scale_fixes[:fixes]}
        relations.scale_fixes[fixes:] = [f for f in relations.scale_fixes[fixes:] if _key(f[0]) not in known]
        known = {_key(rows) for *_, rows in relations.powers[:powers]}
        relations.powers[powers:] = [p for p in relations.powers[powers:] if _key(p[2]) not in known]


def _key(arrays: tuple[Ints, ...]) -> bytes:
    return b"".join(a.tobytes() for a in arrays)
