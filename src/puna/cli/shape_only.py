"""Build modules for their shapes alone.

On the meta device there is nothing to initialise, yet `torch.nn.init.normal_` there imports torch's compiler,
which takes two seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode


class ShapeOnly(TorchFunctionMode):
    """While it is entered, the functions of `torch.nn.init` return their tensor as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call what is no initialisation."""
        named = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return named.get("tensor", args[0] if args else None)
        return func(*args, **named)
