"""From a torch module to an ONNX file: folding, tracing, preprocessing in the graph, int8."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.models import tracing

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import nn

INPUT = "images"
OUTPUT = "scores"


def fold(module: nn.Module) -> tuple[nn.Module, int]:
    """A copy whose multi-branch blocks are single convolutions, and how many blocks were folded.

    Folds blocks with a ``fold()`` of their own (it returns the plain block) and those that timm knows how
    to re-parameterise (RepVGG, MobileOne, FastViT, ...). Sums of kernels and batch norms are worked out in
    float64: in float32 the folded network would differ more than rounding explains.
    """
    from timm.utils.model import reparameterize_model

    folded = copy.deepcopy(module).double()
    count = 0
    for name, block in list(folded.named_modules()):
        if callable(getattr(block, "fold", None)):
            parent, _, child = name.rpartition(".")
            setattr(folded.get_submodule(parent), child, block.fold())
            count += 1
        elif any(callable(getattr(block, way, None)) for way in ("reparameterize", "fuse")):
            count += 1
    return reparameterize_model(folded).float().eval(), count


def to_onnx(module: nn.Module, size: int) -> onnx.ModelProto:
    """``images``, normalised float32 [N, 3, size, size] -> ``scores``, softmax float32 [N, classes].

    The caller compares the file with ``module`` on the validation images, in batches of 1 and of N.

    Raises:
        RetortError: when the network cannot be written.
    """
    import torch
    from torch import nn

    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.network(images), dim=1)

    return tracing.trace(Scores(), torch.zeros(2, 3, size, size), (INPUT, OUTPUT))


def with_preprocessing(
    model: onnx.ModelProto, size: int, mean: Sequence[float], std: Sequence[float]
) -> onnx.ModelProto:
    """Put the preprocessing in front: ``images`` becomes uint8 [N, H, W, 3], RGB, of any height and width.

    The same as ``components.dataset.images.central_square``: the central square is resized with Pillow's
    bicubic filter (a = -0.5, widened when shrinking), along the width and then along the height, rounded to
    whole levels after each; then pixels / 255, minus mean, over std. ONNX's own Resize cannot start between
    two pixels, and OpenVINO leaves out its antialiasing, so both passes are matrix products with weights
    that the graph works out from the image's size. Pillow takes some tall images along the height first:
    there rounding differs, by a few of 255 levels at most.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    pre = _Nodes()
    shape = pre("Cast", pre("Shape", INPUT), to=TensorProto.FLOAT)
    height, width = (pre("Slice", shape, pre.of([axis]), pre.of([axis + 1])) for axis in (1, 2))
    short = pre("Min", height, width)
    pixels = pre("Cast", pre("Transpose", INPUT, perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    columns = _filter(pre, width, short, size)  # [size, W]
    resized = _levels(pre, pre("MatMul", pixels, pre("Transpose", columns, perm=[1, 0])))
    resized = _levels(pre, pre("MatMul", _filter(pre, height, short, size), resized))
    unit = pre("Div", resized, pre.of(255.0))
    scaled = [np.asarray(values, np.float32).reshape(1, 3, 1, 1) for values in (mean, std)]
    normal = pre("Div", pre("Sub", unit, pre.of(scaled[0])), pre.of(scaled[1]))
    # the network's shapes become constants again, which the engines' optimisers need
    ready = pre("Reshape", normal, pre.of([-1, 3, size, size]))

    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    network = list(whole.graph.node)
    for node in network:
        node.input[:] = [ready if name == INPUT else name for name in node.input]
    del whole.graph.node[:], whole.graph.input[:]
    whole.graph.node.extend([*pre.nodes, *network])
    whole.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in pre.constants.items()
    )
    whole.graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["N", "H", "W", 3]))
    return whole


class _Nodes:
    """ONNX nodes written as calls: ``pre("Add", a, b)`` adds a node and gives its output's name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        output = f"preprocess/{len(self.nodes)}_{operator}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], output, **attributes))
        return output

    def of(self, value: Any) -> str:
        """A constant: integers as int64, everything else as float32."""
        import numpy as np

        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        name = f"preprocess/constant_{len(self.constants)}"
        self.constants[name] = array
        return name


def _filter(pre: _Nodes, side: str, short: str, size: int) -> str:
    """Weights [size, side] of the bicubic filter over one side, for the central ``short`` pixels of it."""
    import numpy as np

    step = pre("Div", short, pre.of(float(size)))
    start = pre("Div", pre("Sub", side, short), pre.of(2.0))
    steps = pre.of(np.arange(size, dtype=np.float32).reshape(size, 1) + 0.5)
    centres = pre("Add", pre("Mul", steps, step), start)
    last = pre("Squeeze", side, pre.of([0]))
    places = pre("Add", pre("Range", pre.of(0.0), last, pre.of(1.0)), pre.of(0.5))
    wide = pre("Max", step, pre.of(1.0))
    t = pre("Abs", pre("Div", pre("Sub", places, centres), wide))
    square = pre("Mul", t, t)
    near = pre("Mul", pre("Sub", pre("Mul", t, pre.of(1.5)), pre.of(2.5)), square)  # 1.5 t^3 - 2.5 t^2 + 1
    near = pre("Add", near, pre.of(1.0))
    far = pre(
        "Mul", pre("Add", pre("Mul", t, pre.of(-0.5)), pre.of(2.5)), square
    )  # -0.5 t^3 + 2.5 t^2 - 4 t + 2
    far = pre("Add", pre("Sub", far, pre("Mul", t, pre.of(4.0))), pre.of(2.0))
    outer = pre("Where", pre("Less", t, pre.of(2.0)), far, pre.of(0.0))
    weights = pre("Where", pre("Less", t, pre.of(1.0)), near, outer)
    return pre("Div", weights, pre("ReduceSum", weights, pre.of([1]), keepdims=1))


def _levels(pre: _Nodes, values: str) -> str:
    """Whole levels 0..255: an image of 8 bits is what stands between Pillow's passes and after them."""
    return pre("Clip", pre("Floor", pre("Add", values, pre.of(0.5))), pre.of(0.0), pre.of(255.0))


def quantise(model: onnx.ModelProto, batches: Iterator[np.ndarray], reduce_range: bool) -> onnx.ModelProto:
    """Static int8 quantisation (QDQ, weights per channel), calibrated on ``batches`` of normalised images.

    The softmax stays in float32: its scores are what callers compare. ``reduce_range`` uses 7 bits of the
    weights, against saturation on processors without VNNI.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {INPUT: batch}

    with tempfile.TemporaryDirectory(prefix="retort-int8-") as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        prepared = onnx.ModelProto()
        prepared.CopyFrom(model)
        # the mark of its own preparation, which ``to_onnx`` has done already; without it it warns
        onnx.helper.set_model_props(prepared, {"onnx.quant.pre_process": "onnxruntime.quant"})
        onnx.save(prepared, source)
        quantize_static(
            source, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            reduce_range=reduce_range, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            nodes_to_exclude=[node.name for node in model.graph.node if node.op_type == "Softmax"],
        )  # fmt: skip
        return onnx.load(target)


def save(model: onnx.ModelProto, path: Path, metadata: Mapping[str, str]) -> None:
    """Check the model and write it with ``metadata`` as its metadata_props: the same bytes each time."""
    tracing.save(model, path, metadata, name="classifier")
