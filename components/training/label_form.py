"""How a soft label lies on disk: a few bytes an image and view, from which its probabilities come back.

``tests/benchmarks/bench_labels.py`` measures what each form costs of the gradient of a real teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from components.training.teacher import Teacher

VERSION = 2  # of the bytes: caches of another number are not read
LABEL_BYTES = 64  # that a label takes at most, where not all classes are kept and nothing else is asked for
ALL_CLASSES = 128  # up to so many all are kept: of 200, 20 cost up to 5 % of a flat answer's gradient
LOWEST = -32.0  # least logarithm that the kept classes have: 1e-14, which no loss feels
LEAST_BITS = 12  # of a logarithm: steps of 0.008, an error of 0.4 % of a probability
REST_BYTES = 2
SUREST = 3  # classes of a label by which it is compared with another
LEAST_FELT = -16.0  # ... and the least logarithm of theirs: float16 has steps of 0.016 beyond


@dataclass(frozen=True)
class LabelForm:
    """The bytes of the soft labels of one teacher.

    Logarithms of probabilities are kept, not logits: they differ by one number an image, which no softmax
    sees at any temperature, and they need no scale of their own. Where all classes are kept, each is a
    float16. Else the most probable ones, in falling order, are one little-endian integer each, the class in
    its lower bits and above it the logarithm, in equal steps from ``LOWEST`` to 0; then, as float16, the
    logarithm of what they leave of 1. That is spread evenly over the other classes. It cannot be left out:
    taken as 1 less the rounded others it is wrong by more than itself at a sure teacher, which a temperature
    above 1 brings to light.

    Args:
        classes: that the teacher knows.
        kept: of them in each label.
        temperature: at which the student compares: there the share of the other classes is right.
    """

    classes: int
    kept: int
    temperature: float = 1.0

    @staticmethod
    def of(classes: int, top_k: int | None, temperature: float = 1.0) -> LabelForm:
        """The form for ``distill.top_k_labels``; None: all of few classes, else what ``LABEL_BYTES`` hold."""
        if top_k is None:
            entry = LabelForm(classes, 1)._entry_bytes
            top_k = classes if classes <= ALL_CLASSES else (LABEL_BYTES - REST_BYTES) // entry
        return LabelForm(classes, min(classes, top_k), temperature)

    @property
    def whole(self) -> bool:
        """Whether all classes are kept."""
        return self.kept == self.classes

    @property
    def bytes(self) -> int:
        """Of one label."""
        return 2 * self.classes if self.whole else self.kept * self._entry_bytes + REST_BYTES

    def key(self) -> list[object]:
        """What decides the bytes, for keys of caches."""
        return ["labels", VERSION, self.classes, self.kept, self.temperature]

    @property
    def _class_bits(self) -> int:
        return max(1, (self.classes - 1).bit_length())

    @property
    def _entry_bytes(self) -> int:
        """Three at 1,000 classes (10 bits and 14), four at 100,000 (17 and 15)."""
        return -(-(self._class_bits + LEAST_BITS) // 8)

    @property
    def _levels(self) -> int:
        """Steps from 0 to ``LOWEST``."""
        return (1 << 8 * self._entry_bytes - self._class_bits) - 1

    def ask(self, teacher: Teacher, pixels: Tensor) -> Tensor:
        """Pictures uint8 [B, 3, S, S] -> the teacher's labels uint8 [B, bytes]."""
        return self.encode(teacher(pixels).logits)

    def encode(self, logits: Tensor) -> Tensor:
        """Logits float [B, C] -> uint8 [B, bytes], on the same device."""
        logs = (logits.float() / self.temperature).log_softmax(dim=1)
        if self.whole:
            return logs.half().view(torch.uint8)
        top, classes = logs.topk(self.kept, dim=1)
        code = (top.clamp_min(LOWEST) * (self._levels / LOWEST)).round_().long()
        packed = classes | code << self._class_bits
        entries = torch.stack([packed >> 8 * i & 255 for i in range(self._entry_bytes)], dim=2).byte()
        rest = logs.scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
        return torch.cat([entries.flatten(1), rest.half().view(torch.uint8)], dim=1)

    def logits(self, stored: Tensor) -> Tensor:
        """Uint8 [B, bytes] -> logarithms of probabilities float32 [B, C], on the same device.

        They are those of the teacher's own answer: whoever compares at a temperature divides them by it.
        """
        if self.whole:
            logs = stored.view(torch.float16).float()
        else:
            classes, top = self.entries(stored)
            rest = stored[:, -REST_BYTES:].contiguous().view(torch.float16).float()
            rest = rest - math.log(self.classes - self.kept)
            logs = rest.expand(-1, self.classes).scatter(1, classes, top)
        return (logs * self.temperature).log_softmax(dim=1)

    def apart(self, stored: Tensor, again: Tensor) -> Tensor:
        """How far labels are from others of the same pictures: nats, float32 [B].

        The largest difference of the log-probabilities of the classes that ``stored`` is surest of. One below
        ``LEAST_FELT`` counts as that.
        """
        logs, others = (self.logits(part).clamp_min(LEAST_FELT) for part in (stored, again))
        top = logs.topk(min(SUREST, self.classes), dim=1).indices
        return (logs.gather(1, top) - others.gather(1, top)).abs().amax(dim=1)

    def entries(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """The kept classes int64 [B, k] of labels of which not all are, and their logarithms float32."""
        parts = stored[:, :-REST_BYTES].reshape(len(stored), self.kept, self._entry_bytes).long()
        packed = parts[..., 0]
        for i in range(1, self._entry_bytes):
            packed = packed | parts[..., i] << 8 * i
        code = packed >> self._class_bits
        return packed & (1 << self._class_bits) - 1, code.float() * (LOWEST / self._levels)
