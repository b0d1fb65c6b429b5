"""From a torch module to an ONNX graph: tracing, paddings as constants, constants folded."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import RetortError

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import nn

OPSET = 18


def trace(network: nn.Module, example: torch.Tensor, names: Sequence[str]) -> onnx.ModelProto:
    """The graph of ``network`` for inputs like ``example``, of any batch size.

    Two exporters come with torch. The tracing one takes about one second for an EfficientNet, the newer one
    (``dynamo=True``) eight to nine, in each of the two export steps of every run; once paddings are
    constants both give the same list of operators. So tracing is tried first, and the newer one where
    tracing lacks an operator. Neither is trusted: callers compare what they get with the network.

    Args:
        example: two images or more: a graph traced with one may take the 1 for a constant.
        names: of the graph's input, and of its outputs.

    Raises:
        RetortError: when neither exporter can write the network.
    """
    import torch

    given, *results = names
    network = _constant_padding(copy.deepcopy(network).eval(), example)
    with tempfile.TemporaryDirectory(prefix="retort-export-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporters themselves; what matters is measured afterwards
        path = Path(folder) / "network.onnx"
        shared: dict[str, Any] = {"input_names": [given], "output_names": results, "opset_version": OPSET}
        try:
            with _graph_unprinted():
                torch.onnx.export(
                    network,
                    (example,),
                    path,
                    dynamo=False,
                    dynamic_axes={name: {0: "N"} for name in names},
                    **shared,
                )
            return _simplified(path)
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as traced:
            batch = torch.export.Dim("N", min=1)
            try:
                torch.onnx.export(
                    network,
                    (example,),
                    path,
                    dynamo=True,
                    dynamic_shapes=({0: batch},),
                    external_data=False,
                    verbose=False,
                    **shared,
                )
                return _simplified(path)
            except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
                raise RetortError(
                    f"{type(network).__name__} cannot be written as ONNX: {_first_line(traced)}; "
                    f"and with the newer exporter: {_first_line(error)}"
                ) from error


@contextmanager
def _graph_unprinted() -> Iterator[None]:
    """Keep the tracing exporter from printing a graph of hundreds of lines when an operator is beyond it.

    torch means to print it only when asked to, but asks a function's truth where it should call the function
    (``setup_onnx_logging``), so there is no other switch.
    """
    import torch

    bindings: Any = torch._C
    original = bindings._jit_onnx_log
    bindings._jit_onnx_log = lambda *graph: None
    try:
        yield
    finally:
        bindings._jit_onnx_log = original


def save(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str], name: str) -> None:
    """Check the graph and write it with ``metadata`` as its metadata_props: the same bytes each time."""
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    model.producer_name = "retort"
    model.graph.name = name
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _simplified(path: Path) -> onnx.ModelProto:
    """The model with constants folded and paddings merged into their convolutions, in standard operators."""
    import onnx
    import onnxruntime

    target = path.with_name("simplified.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no other base
        raise RuntimeError(f"ONNX Runtime refuses the file: {_first_line(error)}") from error
    return onnx.load(target)


def _constant_padding(module: nn.Module, example: Any) -> nn.Module:
    """Replace convolutions that work out TensorFlow's SAME padding at run time: the input's size is known.

    Otherwise the trace holds some 500 operators of shape arithmetic, which cost a third of the latency.
    """
    import torch
    from timm.layers import Conv2dSame
    from timm.layers.padding import pad_same_arg
    from torch import nn

    sizes: dict[str, list[int]] = {}
    found = [(name, conv) for name, conv in module.named_modules() if isinstance(conv, Conv2dSame)]
    hooks = []
    for name, conv in found:

        def remember(_: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
            sizes[name] = list(inputs[0].shape[-2:])

        hooks.append(conv.register_forward_pre_hook(remember))
    with torch.inference_mode():
        module(example)
    for hook in hooks:
        hook.remove()
    for name, conv in found:
        padding = pad_same_arg(sizes[name], list(conv.kernel_size), list(conv.stride), list(conv.dilation))
        plain = nn.Conv2d(1, 1, 1)
        vars(plain).update(vars(conv))  # the same convolution, with the forward pass of its base class
        left, right, top, bottom = padding
        padded = nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), plain)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, padded)
    return module


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
