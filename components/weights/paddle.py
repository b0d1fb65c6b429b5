"""PaddleClas's names: which network a file is of, and what each of its tensors is called in timm.

Each network has up to three sets of names: those of the static graph (tars of variables), of PaddleClas 2.0,
and of later releases (both ``.pdparams``). All say the same: a layer, and a role in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

# the role of a tensor in its layer -> PyTorch's word
ROLES = {
    "weight": "weight", "weights": "weight", "scale": "weight", "w_0": "weight",
    "bias": "bias", "offset": "bias", "b_0": "bias",
    "_mean": "running_mean", "mean": "running_mean",
    "_variance": "running_var", "variance": "running_var",
}  # fmt: skip
NORM = r"(scale|offset|mean|variance)"
ROLE = r"(weight|bias|_mean|_variance)"
LAYER = r"(conv|bn|_conv|_batch_norm)"

Depths = tuple[int, ...]
Place = Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class Published:
    """A published network that a file was recognised as.

    ``name`` is PaddleClas's, ``archs`` the architectures that compute the same, ``names`` maps the file's
    tensors to timm's; a matrix among ``transposed`` (file names) is stored the other way round.
    """

    name: str
    archs: tuple[str, ...]
    names: dict[str, str]
    transposed: frozenset[str]


def recognise(names: Iterable[str]) -> Published | None:
    """The network that names belong to; None when they are of no known network."""
    listed = list(names)
    for family in (_resnet, _mobilenet_v1, _mobilenet_v2, _mobilenet_v3):
        found = family(listed)
        if found is not None:
            return found
    return None


def is_paddle(names: Iterable[str]) -> bool:
    """Whether names are in Paddle's style at all: running statistics called ``_mean``, ``_variance``."""
    return any(re.search(r"(\._mean|\._variance|_bn_mean|_bn_variance)$", name) for name in names)


def same_names(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> Published:
    """A Paddle network whose layers are called as in PyTorch (``paddle.vision``): only roles differ."""
    renamed, transposed = {}, set()
    for name in names:
        layer, _, role = name.rpartition(".")
        renamed[name] = f"{layer}.{ROLES.get(role, role)}" if layer else name
        if role == "weight" and len(shapes[name]) == 2:
            transposed.add(name)
    return Published("a Paddle network", (), renamed, frozenset(transposed))


def _translate(
    names: Iterable[str], patterns: Mapping[str, Place], head: str
) -> tuple[dict[str, str], set[str]]:
    """Names by the first pattern that fits; the last group is the role. And those of the head's matrix."""
    translated: dict[str, str] = {}
    transposed: set[str] = set()
    for name in names:
        for pattern, place in patterns.items():
            found = re.fullmatch(pattern, name, re.DOTALL)
            if found:
                layer, role = place(found), ROLES[found.groups()[-1]]
                translated[name] = f"{layer}.{role}"
                if layer == head and role == "weight":
                    transposed.add(name)
                break
        else:
            translated[name] = name
    return translated, transposed


def _norm(layer: str, conv: str, norm: str) -> str:
    """Where a layer's tensor goes: to the convolution, or to the norm after it."""
    return conv if layer.endswith("conv") or layer in ("res", "weights") else norm


# --- ResNet, ResNet_vd ------------------------------------------------------------------------------------

RESNETS: dict[tuple[bool, Depths], tuple[str, dict[bool, str]]] = {
    (False, (2, 2, 2, 2)): ("ResNet18", {True: "resnet18_vd", False: "resnet18_paddle"}),
    (False, (3, 4, 6, 3)): ("ResNet34", {True: "resnet34_vd", False: "resnet34_paddle"}),
    (True, (3, 4, 6, 3)): ("ResNet50", {True: "resnet50d", False: "resnet50"}),
    (True, (3, 4, 23, 3)): ("ResNet101", {True: "resnet101d", False: "resnet101"}),
    (True, (3, 8, 36, 3)): ("ResNet152", {True: "resnet152d", False: "resnet152"}),
    (True, (3, 12, 48, 3)): ("ResNet200", {True: "resnet200_vd", False: ""}),
}
STATIC_BLOCK = r"(res|bn)(\d)(.)(\d{0,3})_branch(1|2[abc])_(weights|scale|offset|mean|variance)"
BETA_VD_BLOCK = r"bb_(\d{1,3})_(\d{1,3})\.(conv\d|short)\." + LAYER + r"\." + ROLE
BETA_BLOCK = r"res(\d)(.)(\d{0,3})\.(conv\d|short)\." + LAYER + r"\." + ROLE
BLOCK = r"blocks\.(\d{1,3})\.(conv\d|short)\." + LAYER + r"\." + ROLE


def _resnet(names: list[str]) -> Published | None:
    blocks: dict[int, set[int]] = {}
    flat: set[int] = set()
    bottleneck = False
    for name in names:
        if found := re.fullmatch(STATIC_BLOCK, name, re.DOTALL):
            blocks.setdefault(int(found[2]) - 2, set()).add(_index(found[3], found[4]))
            bottleneck |= found[5] == "2c"
        elif found := re.fullmatch(BETA_BLOCK, name, re.DOTALL):
            blocks.setdefault(int(found[1]) - 2, set()).add(_index(found[2], found[3]))
            bottleneck |= found[4] == "conv2"
        elif found := re.fullmatch(BETA_VD_BLOCK, name):
            blocks.setdefault(int(found[1]), set()).add(int(found[2]))
            bottleneck |= found[3] == "conv2"
        elif found := re.fullmatch(BLOCK, name):
            flat.add(int(found[1]))
            bottleneck |= found[2] == "conv2"
    if not blocks and not flat:
        return None
    vd = any(re.match(r"stem\.1\.|conv1_1\.|conv1_1_|bnv1_1_", name) for name in names)
    depths = next(
        (
            known
            for kind, known in RESNETS
            if kind == bottleneck
            and (sum(known) == max(flat) + 1 if flat else known == tuple(_counts(blocks)))
        ),
        None,
    )
    if depths is None:
        return None
    name, archs = RESNETS[bottleneck, depths]
    patterns = _resnet_patterns(depths, vd)
    translated, transposed = _translate(names, patterns, "fc")
    return Published(f"{name}{'_vd' if vd else ''}", (archs[vd],), translated, frozenset(transposed))


def _counts(blocks: Mapping[int, set[int]]) -> list[int]:
    return [max(blocks.get(stage, {-1})) + 1 for stage in range(max(blocks) + 1)]


def _index(letter: str, number: str) -> int:
    """``res4a`` is the first block; ``res4b7`` the eighth of many, ``res4c`` the third of few.

    ResNet200 counts on beyond ``z``, through whatever characters come then.
    """
    return int(number) if number else max(0, ord(letter) - ord("a"))


def _resnet_patterns(depths: Depths, vd: bool) -> dict[str, Place]:
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    places = [(stage, number - starts[stage]) for number in range(sum(depths))
              for stage in [max(s for s, start in enumerate(starts) if start <= number)]]  # fmt: skip

    def stem(number: int, layer: str) -> str:
        if not vd:
            return _norm(layer, "conv1", "bn1")
        return _norm(layer, f"conv1.{3 * number}", "bn1" if number == 2 else f"conv1.{3 * number + 1}")

    def block(stage: int, number: int, part: str, layer: str) -> str:
        above = f"layer{stage + 1}.{number}"
        if part == "short":
            first = 1 if vd else 0
            return f"{above}.downsample.{_norm(layer, str(first), str(first + 1))}"
        index = int(part.removeprefix("conv")) + 1
        return f"{above}.{_norm(layer, f'conv{index}', f'bn{index}')}"

    def branch(name: str) -> str:
        return "short" if name == "1" else f"conv{'abc'.index(name[1])}"

    return {
        r"stem\.(\d)\." + LAYER + r"\." + ROLE: lambda m: stem(int(m[1]), m[2]),
        BLOCK: lambda m: block(*places[int(m[1])], m[2], m[3]),
        r"conv\." + LAYER + r"\." + ROLE: lambda m: stem(0, m[1]),
        r"conv1_(\d)\." + LAYER + r"\." + ROLE: lambda m: stem(int(m[1]) - 1, m[2]),
        BETA_VD_BLOCK: lambda m: block(int(m[1]), int(m[2]), m[3], m[4]),
        BETA_BLOCK: lambda m: block(int(m[1]) - 2, _index(m[2], m[3]), m[4], m[5]),
        r"conv1_(\d)_(weights)": lambda m: stem(int(m[1]) - 1, "conv"),
        r"bnv1_(\d)_" + NORM: lambda m: stem(int(m[1]) - 1, "bn"),
        r"conv1_(weights)": lambda m: stem(0, "conv"),
        r"bn_conv1_" + NORM: lambda m: stem(0, "bn"),
        STATIC_BLOCK: lambda m: block(int(m[2]) - 2, _index(m[3], m[4]), branch(m[5]), m[1]),
        r"(?:fc|out)\.(weight|bias)": lambda m: "fc",
        r"fc_0\.(w_0|b_0)": lambda m: "fc",
    }


# --- MobileNets -------------------------------------------------------------------------------------------


def _blocks(depths: Depths) -> list[str]:
    """timm's name of each block, counted through all stages."""
    return [f"blocks.{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]


V1 = _blocks((1, 2, 2, 6, 2))
V1_STATIC = ["2_1", "2_2", "3_1", "3_2", "4_1", "4_2", *(f"5_{i}" for i in range(1, 7)), "6"]


def _mobilenet_v1(names: list[str]) -> Published | None:
    marks = (r"blocks\.\d+\.depthwise_conv\.", r"conv\d_\d\._depthwise_conv\.", r"conv\d_\d_dw_")
    if not _marked(names, marks):
        return None

    def separable(block: str, part: str, layer: str) -> str:
        number = 1 if part in ("depthwise", "dw") else 2
        return f"{block}.{_norm(layer, 'conv_dw' if number == 1 else 'conv_pw', f'bn{number}')}"

    static = dict(zip(V1_STATIC, V1, strict=True))
    which = "(" + "|".join(V1_STATIC) + ")"
    patterns: dict[str, Place] = {
        r"(?:conv|conv1)\." + LAYER + r"\." + ROLE: lambda m: _norm(m[1], "conv_stem", "bn1"),
        r"conv1_(weights)": lambda m: "conv_stem",
        r"conv1_bn_" + NORM: lambda m: "bn1",
        rf"blocks\.({_numbers(V1)})\.(depthwise|pointwise)_conv\." + LAYER + r"\." + ROLE:
            lambda m: separable(V1[int(m[1])], m[2], m[3]),
        rf"conv{which}\._(depthwise|pointwise)_conv\." + LAYER + r"\." + ROLE:
            lambda m: separable(static[m[1]], m[2], m[3]),
        rf"conv{which}_(dw|sep)_(weights)": lambda m: separable(static[m[1]], m[2], "conv"),
        rf"conv{which}_(dw|sep)_bn_" + NORM: lambda m: separable(static[m[1]], m[2], "bn"),
        r"(?:fc|out)\.(weight|bias)": lambda m: "classifier",
        r"fc7_(weights|offset)": lambda m: "classifier",
    }  # fmt: skip
    translated, transposed = _translate(names, patterns, "classifier")
    return Published("MobileNetV1", ("mobilenetv1_100_paddle",), translated, frozenset(transposed))


INVERTED = {"expand": ("conv_pw", "bn1"), "bottleneck": ("conv_dw", "bn2"), "dwise": ("conv_dw", "bn2"),
            "depthwise": ("conv_dw", "bn2"), "linear": ("conv_pwl", "bn3")}  # fmt: skip


def _inverted(block: str, part: str, layer: str) -> str:
    return f"{block}.{_norm(layer, *INVERTED[part])}"


def _mobilenet_v2(names: list[str]) -> Published | None:
    if not _marked(names, (r"conv\d\._first_block\.", r"conv\d_\d_(expand|dwise|linear)_")):
        return None
    part = r"(expand|bottleneck|linear)"
    patterns: dict[str, Place] = {
        r"conv1\." + LAYER + r"\." + ROLE: lambda m: _norm(m[1], "conv_stem", "bn1"),
        r"conv1_1_(weights)": lambda m: "conv_stem",
        r"conv1_1_bn_" + NORM: lambda m: "bn1",
        r"conv([2-8])\._first_block\._" + part + r"_conv\." + LAYER + r"\." + ROLE:
            lambda m: _inverted(f"blocks.{int(m[1]) - 2}.0", m[2], m[3]),
        r"conv([2-8])\.conv\1_(\d)\._" + part + r"_conv\." + LAYER + r"\." + ROLE:
            lambda m: _inverted(f"blocks.{int(m[1]) - 2}.{int(m[2]) - 1}", m[3], m[4]),
        r"conv([2-8])_(\d)_(expand|dwise|linear)_(weights)":
            lambda m: _inverted(f"blocks.{int(m[1]) - 2}.{int(m[2]) - 1}", m[3], "conv"),
        r"conv([2-8])_(\d)_(expand|dwise|linear)_bn_" + NORM:
            lambda m: _inverted(f"blocks.{int(m[1]) - 2}.{int(m[2]) - 1}", m[3], "bn"),
        r"conv9\." + LAYER + r"\." + ROLE: lambda m: _norm(m[1], "conv_head", "bn2"),
        r"conv9_(weights)": lambda m: "conv_head",
        r"conv9_bn_" + NORM: lambda m: "bn2",
        r"(?:fc|out)\.(weight|bias)": lambda m: "classifier",
        r"fc10_(weights|offset)": lambda m: "classifier",
    }  # fmt: skip
    translated, transposed = _translate(names, patterns, "classifier")
    return Published("MobileNetV2", ("mobilenetv2_100_paddle",), translated, frozenset(transposed))


V3 = {"small": _blocks((1, 2, 3, 2, 3)), "large": _blocks((1, 2, 3, 4, 2, 3))}


def _mobilenet_v3(names: list[str]) -> Published | None:
    # PaddleClas 2.0 and the static graph number blocks from 2 on
    marks = (
        r"blocks\.(\d{1,3})\.bottleneck_conv\.",
        r"conv(\d{1,3})\.bottleneck_conv\.",
        r"conv(\d{1,3})_depthwise_",
    )
    found = _marked(names, marks)
    if not found:
        return None
    highest = max(int(m[1]) - (0 if m[0].startswith("blocks") else 2) for m in found)
    size = next((size for size, blocks in V3.items() if len(blocks) == highest + 1), None)
    if size is None:
        return None
    blocks = V3[size]
    later = "(" + "|".join(str(number + 2) for number in range(len(blocks))) + ")"
    last = f"blocks.{int(blocks[-1].split('.')[1]) + 1}.0"
    part = r"(expand|bottleneck|linear)_conv\."
    squeeze = {"1": "se.conv_reduce", "2": "se.conv_expand"}
    patterns: dict[str, Place] = {
        r"(?:conv|conv1)\." + LAYER + r"\." + ROLE: lambda m: _norm(m[1], "conv_stem", "bn1"),
        r"conv1_(weights)": lambda m: "conv_stem",
        r"conv1_bn_" + NORM: lambda m: "bn1",
        rf"blocks\.({_numbers(blocks)})\." + part + LAYER + r"\." + ROLE:
            lambda m: _inverted(blocks[int(m[1])], m[2], m[3]),
        rf"blocks\.({_numbers(blocks)})\.mid_se\.conv([12])\.(weight|bias)":
            lambda m: f"{blocks[int(m[1])]}.{squeeze[m[2]]}",
        rf"conv{later}\." + part + LAYER + r"\." + ROLE:
            lambda m: _inverted(blocks[int(m[1]) - 2], m[2], m[3]),
        rf"conv{later}\.mid_se\.conv([12])\.(weight|bias)":
            lambda m: f"{blocks[int(m[1]) - 2]}.{squeeze[m[2]]}",
        rf"conv{later}_(expand|depthwise|linear)_(weights)":
            lambda m: _inverted(blocks[int(m[1]) - 2], m[2], "conv"),
        rf"conv{later}_(expand|depthwise|linear)_bn_" + NORM:
            lambda m: _inverted(blocks[int(m[1]) - 2], m[2], "bn"),
        rf"conv{later}_se_([12])_(weights|offset)":
            lambda m: f"{blocks[int(m[1]) - 2]}.{squeeze[m[2]]}",
        r"last_second_conv\." + LAYER + r"\." + ROLE: lambda m: f"{last}.{_norm(m[1], 'conv', 'bn1')}",
        r"conv_last_(weights)": lambda m: f"{last}.conv",
        r"conv_last_bn_" + NORM: lambda m: f"{last}.bn1",
        r"last_conv\.(weight)": lambda m: "conv_head",
        r"last_1x1_conv_(weights)": lambda m: "conv_head",
        r"(?:fc|out)\.(weight|bias)": lambda m: "classifier",
        r"fc_(weights|offset)": lambda m: "classifier",
    }  # fmt: skip
    translated, transposed = _translate(names, patterns, "classifier")
    arch = f"mobilenetv3_{size}_100_paddle"
    return Published(f"MobileNetV3_{size}", (arch,), translated, frozenset(transposed))


def _marked(names: Iterable[str], marks: Iterable[str]) -> list[re.Match[str]]:
    """Matches at the beginning of names, of the patterns that only one family has."""
    return [found for name in names for mark in marks if (found := re.match(mark, name))]


def _numbers(blocks: list[str]) -> str:
    """A pattern of the numbers that blocks have."""
    return "|".join(str(number) for number in range(len(blocks)))
