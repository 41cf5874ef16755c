"""Objects that describe a call, such as masks and scores: data that compares, prints, copies, pickles and moves."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import as_device, describe


class Description:
    """Base of frozen dataclasses whose fields are numbers, words and tensors.

    Tensors are kept, not copied, and read when a call is made. Two descriptions are equal if they have one class and
    equal fields; tensors are equal in dtype, device, shape and value. Because a tensor can change, there is no hash.
    """

    __dataclass_fields__: ClassVar[dict[str, Field]]
    __hash__: ClassVar[None]  # type: ignore[assignment]
    prefix: ClassVar[str] = ""  # of the name that a repr begins with

    def to(self, device: torch.device | str | int) -> Any:
        """The same with its tensors on a device."""
        device = as_device(device)
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __repr__(self) -> str:
        """The call that makes it; of a tensor, dtype and shape."""
        given = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.default is MISSING:
                given.append(_shown(value))
            elif not _same(value, f.default):
                given.append(f"{f.name}={_shown(value)}")
        return f"{self.prefix}({', '.join(given)})"


def _moved(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _shown(x: Any) -> str:
    return f"<{describe(x)}>" if isinstance(x, Tensor) else repr(x)
