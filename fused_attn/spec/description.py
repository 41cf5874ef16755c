"""Base class of masks and scores: data that can be compared, printed, copied, pickled and moved to a device."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import as_device, describe


class Description:
    """Base of frozen dataclasses whose fields are numbers, strings and tensors.

    Tensors are stored without a copy and read at each call. Two descriptions are equal if their classes and fields are
    equal; equal tensors agree in dtype, device, shape and values. There is no hash, because tensors can change.
    """

    __dataclass_fields__: ClassVar[dict[str, Field]]
    __hash__: ClassVar[None]  # type: ignore[assignment]
    prefix: ClassVar[str] = ""  # the name that the repr calls

    def to(self, device: torch.device | str | int) -> Any:
        """A copy with all tensors on a device."""
        device = as_device(device)
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __repr__(self) -> str:
        """The constructor call; tensors are shown by dtype and shape."""
        args = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.default is MISSING:
                args.append(_shown(value))
            elif not _same(value, f.default):
                args.append(f"{f.name}={_shown(value)}")
        return f"{self.prefix}({', '.join(args)})"


def _moved(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _shown(x: Any) -> str:
    return f"<{describe(x)}>" if isinstance(x, Tensor) else repr(x)
