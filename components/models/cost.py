"""What decides speed (row 3.5 of the FAQ): parameters, FLOPs, memory access, activations, parallel work.

A network is run once on tensors without content (torch's device ``meta``), in eval mode, and every operator
that it calls is recorded: nothing is allocated, and every network that runs can be measured. All figures
are for one image in float32 and for the network as torch runs it, operator by operator: an engine that
merges a batch norm or an activation into its convolution saves their memory access, and no FLOPs by the
formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from components.common.errors import RetortError
from components.models import flops
from components.models.flops import Count

IMAGE = -1  # the "operator" that brings the image


@dataclass
class Layer:
    """The operators that one module calls itself, not through a child.

    Attributes:
        kind: the module's class; of a module with children, the operators that stand between them.
        output: shape of the last result, without the batch.
        parameters: elements held by the module itself.
        flops: by the FAQ's formula, see ``components.models.flops``.
        other: operations that the formula leaves out: batch norm, activation, softmax, sums of branches.
        macs: multiply-accumulates, what many tools print as "FLOPs".
        access_bytes: memory access cost: inputs, weights and outputs of every operator, each once (no cache;
            a group convolution of the same FLOPs has more channels, and that is what it pays here).
        activation_bytes: activations that exist while the layer runs, at most: its inputs, its outputs, and
            what is held for later layers.
        held_bytes: of these, what the layer neither reads nor writes: a shortcut waits for its sum.
        parallel: whether some other work neither needs its result nor gives it one.
    """

    name: str
    kind: str
    output: tuple[int, ...] = ()
    parameters: int = 0
    flops: int = 0
    other: int = 0
    macs: int = 0
    access_bytes: int = 0
    activation_bytes: int = 0
    held_bytes: int = 0
    parallel: bool = False

    @property
    def intensity(self) -> float:
        """Operations per byte of memory access."""
        return (self.flops + self.other) / self.access_bytes if self.access_bytes else 0.0


@dataclass
class Cost:
    """A network's layers in the order in which they run, and what holds for the whole.

    Attributes:
        peak_layer: the layer with the most ``activation_bytes``.
        carried_bytes: activations that wait between two operators, at most. This is the FAQ's picture: a
            residual block carries its input beside the branch's result, twice what a plain block carries.
        parallel_share: share of all operations off the longest chain of operators that wait for each other;
            with any number of processors, that chain remains.
    """

    input_size: tuple[int, int, int]
    layers: list[Layer]
    peak_layer: str
    carried_bytes: int
    parallel_share: float

    def total(self, what: str) -> int:
        """Sum over the layers of ``parameters``, ``flops``, ``other``, ``macs`` or ``access_bytes``."""
        return sum(getattr(layer, what) for layer in self.layers)

    @property
    def peak(self) -> Layer:
        return next(layer for layer in self.layers if layer.name == self.peak_layer)

    @property
    def intensity(self) -> float:
        """Operations per byte of memory access."""
        return (self.total("flops") + self.total("other")) / max(self.total("access_bytes"), 1)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """The network that ``make`` builds, with shapes and no memory for its values; in eval mode."""
    with torch.device("meta"):
        return make().eval()


def measure(module: nn.Module, size: Sequence[int]) -> Cost:
    """Count everything about a network.

    Args:
        module: on the device ``meta``, in eval mode; see ``on_meta``.
        size: channels, height and width of the image.

    Raises:
        RetortError: when the network takes no image of this size.
    """
    channels, height, width = size
    image = torch.empty(1, channels, height, width, device="meta")
    recorder = _Recorder(module, image)
    try:
        with recorder.modules(), torch.inference_mode(), recorder:
            result = module(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RetortError(
            f"{type(module).__name__} cannot run on an image of {height} x {width} pixels: {first}; "
            "try another --size"
        ) from None
    recorder.keep(result)
    return _add_up(recorder, (channels, height, width))


@dataclass
class _Call:
    """One operator that was called; storages are known by number."""

    layer: str
    operator: str
    count: Count
    access: int
    output: tuple[int, ...]
    reads: list[int]
    writes: list[int]
    needs: set[int] = field(default_factory=set)


@dataclass
class _Storage:
    """Memory behind tensors: its size in bytes, the calls between which it lives, its writers and readers."""

    nbytes: int
    born: int
    last: int
    writer: int
    readers: list[int] = field(default_factory=list)


class _Recorder(TorchDispatchMode):
    """Writes down every operator, the module that called it, and what it reads and writes."""

    def __init__(self, module: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.module = module
        self.calls: list[_Call] = []
        self.storages: dict[int, _Storage] = {}
        self._stack = [""]
        self._kept_alive: list[Any] = []  # a storage that went could lend its identity to another
        self._weights = {_identity(t) for t in (*module.parameters(), *module.buffers())}
        self.storages[self._known(image)] = _Storage(_nbytes(image), IMAGE, IMAGE, IMAGE)

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Know, while it lasts, which module is running."""
        hooks = []
        for name, module in self.module.named_modules():

            def enter(_: nn.Module, __: Any, name: str = name) -> None:
                self._stack.append(name)

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                self._stack.pop()

            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in flops.WHOLE:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        self._record(func, args, kwargs, result)
        return result

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        inputs = list({id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}.values())
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.numel()]
        changes = func._schema.is_mutable
        sources = {self._known(t) for t in inputs}
        if not outputs or (not changes and all(self._known(t) in sources for t in outputs)):
            return  # a view: another way to look at the same memory
        here = len(self.calls)
        reads = [key for t in inputs if (key := self._known(t)) in self.storages]
        writes = [self._known(t) for t in outputs]
        call = _Call(
            layer=self._stack[-1],
            operator=func.overloadpacket.__name__,
            count=flops.count(func, args, outputs),
            access=sum(_nbytes(t) for t in (*inputs, *outputs)),
            output=tuple(outputs[0].shape[1:]),
            reads=list(dict.fromkeys(reads)),
            writes=list(dict.fromkeys(writes)),
        )
        for key in call.reads:
            storage = self.storages[key]
            storage.last = here
            storage.readers.append(here)
            call.needs.add(storage.writer)
        for key, tensor in zip(writes, outputs, strict=True):
            known = self.storages.get(key)
            if known is None:
                size = tensor.untyped_storage().nbytes()
                self.storages[key] = _Storage(size, born=here, last=here, writer=here)
            else:  # in place: after all who wanted the old values
                call.needs.update(reader for reader in known.readers if reader != here)
                known.writer, known.readers = here, []
        self.calls.append(call)

    def keep(self, result: Any) -> None:
        """The network's results live to the end."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := self._known(tensor)) in self.storages:
                self.storages[key].last = len(self.calls)

    def _known(self, tensor: Tensor) -> int:
        self._kept_alive.append(tensor.untyped_storage())
        return _identity(tensor)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensor: Tensor) -> int:
    """Bytes that reading or writing a tensor touches: of an expanded one, what is behind it."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _add_up(recorder: _Recorder, size: tuple[int, int, int]) -> Cost:
    calls, storages = recorder.calls, recorder.storages
    live, carried = _lifetimes(calls, list(storages.values()))
    chain, beside = _chains(calls)
    layers: dict[str, Layer] = {}
    own: dict[str, int] = {}
    operators: dict[str, list[str]] = {}
    seen: set[int] = set()
    for name, parameter in recorder.module.named_parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            owner = name.rpartition(".")[0]
            own[owner] = own.get(owner, 0) + parameter.numel()
    for index, call in enumerate(calls):
        layer = layers.setdefault(call.layer, Layer(call.layer, ""))
        operators.setdefault(call.layer, []).append(call.operator.strip("_"))
        used = sum(storages[key].nbytes for key in {*call.reads, *call.writes})
        layer.output = call.output
        layer.flops += call.count.flops
        layer.other += call.count.other
        layer.macs += call.count.macs
        layer.access_bytes += call.access
        if live[index] >= layer.activation_bytes:
            layer.activation_bytes, layer.held_bytes = live[index], live[index] - used
        layer.parallel = layer.parallel or beside[index]
    for name, count in own.items():
        layers.setdefault(name, Layer(name, "")).parameters = count
    for name, layer in layers.items():
        module = recorder.module.get_submodule(name)
        layer.kind = type(module).__name__
        if next(module.children(), None) is not None and name in operators:
            layer.kind = " ".join(dict.fromkeys(operators[name]))
        layer.name = name or "(network)"
    work = sum(_work(call) for call in calls)
    peak = max(layers.values(), key=lambda layer: layer.activation_bytes)
    return Cost(size, list(layers.values()), peak.name, carried, 1 - chain / work if work else 0.0)


def _work(call: _Call) -> int:
    return call.count.flops + call.count.other


def _lifetimes(calls: Sequence[_Call], storages: Sequence[_Storage]) -> tuple[list[int], int]:
    """Bytes alive during each call, and the most that wait between two calls.

    A storage lives from the call that makes it to the last that reads it, as an engine would plan it.
    """
    during, between = [0] * (len(calls) + 2), [0] * (len(calls) + 2)
    for storage in storages:
        during[max(storage.born, 0)] += storage.nbytes
        during[storage.last + 1] -= storage.nbytes
        between[max(storage.born, 0)] += storage.nbytes
        between[max(storage.last, 0)] -= storage.nbytes
    for index in range(1, len(during)):
        during[index] += during[index - 1]
        between[index] += between[index - 1]
    return during, max(between)


def _chains(calls: Sequence[_Call]) -> tuple[int, list[bool]]:
    """Operations on the longest chain of calls, and whether each call could run beside another one.

    Calls that work on weights alone (a table of positions) wait for nothing, and could run beside
    everything: they are not asked.
    """
    longest: list[int] = []
    before: list[int] = []  # bit j of before[i]: call i waits for call j, directly or not
    from_image: list[bool] = []
    for call in calls:
        needs = [need for need in call.needs if need != IMAGE]
        longest.append(_work(call) + max((longest[need] for need in needs), default=0))
        mask = 0
        for need in needs:
            mask |= before[need] | 1 << need
        before.append(mask)
        from_image.append(IMAGE in call.needs or any(from_image[need] for need in needs))
    working = [i for i, call in enumerate(calls) if _work(call) and from_image[i]]
    beside = [False] * len(calls)
    for i in working:
        for j in working:
            if j < i and not before[i] >> j & 1:
                beside[i] = beside[j] = True
    return max(longest, default=0), beside
