from collections.abc import Sequence

from torch import Tensor

class QuantMatrix:
    def __init__(self, tiles: Tensor, type: int, rows: int, columns: int) -> None: ...
    def pack(self, rows: Tensor) -> None: ...
    def unpack(self, numbers: Tensor, out: Tensor) -> None: ...

def usable() -> list[str]: ...
def chosen() -> str: ...
def choose(name: str) -> None: ...
def num_threads() -> int: ...
def linear(
    x: int,
    dtype: int,
    tokens: int,
    columns: int,
    stride: int,
    matrices: Sequence[QuantMatrix],
    outs: Sequence[int],
    out_sizes: Sequence[int],
) -> None: ...
def dense_linear(
    x: int,
    dtype: int,
    tokens: int,
    columns: int,
    stride: int,
    weight_dtype: int,
    weights: Sequence[int],
    weight_sizes: Sequence[int],
    outs: Sequence[int],
    out_sizes: Sequence[int],
) -> None: ...
