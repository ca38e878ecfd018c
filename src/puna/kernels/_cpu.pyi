from collections.abc import Sequence

from torch import Tensor

class QuantMatrix:
    def __init__(self, tiles: Tensor, type: int, rows: int, columns: int) -> None: ...
    def pack(self, rows: Tensor, threads: int) -> None: ...
    def unpack(self, numbers: Tensor, out: Tensor, threads: int) -> None: ...

def usable() -> list[str]: ...
def chosen() -> str: ...
def choose(name: str) -> None: ...
def threads_are_lost() -> bool: ...
def advise_huge_pages(memory: Tensor) -> None: ...
def linear(
    x: int,
    dtype: int,
    tokens: int,
    columns: int,
    stride: int,
    matrices: Sequence[QuantMatrix],
    outs: Sequence[int],
    out_sizes: Sequence[int],
    threads: int,
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
    threads: int,
) -> None: ...
def dequantize_4bit(
    packed: int,
    num_bytes: int,
    code: int,
    block_size: int,
    scales: int,
    nested: int,
    num_blocks: int,
    nested_code: int,
    nested_scales: int,
    num_nested: int,
    offset: float,
    first: int,
    count: int,
    out: int,
    threads: int,
) -> None: ...
def quantize(
    x: int,
    groups: int,
    group_size: int,
    weights: int,
    weight_groups: int,
    affine: bool,
    free_minimum: bool,
    low: int,
    high: int,
    level_table: int,
    trials: Sequence[float],
    block_groups: int,
    scale_low: int,
    scale_high: int,
    d: int,
    dmin: int,
    scales: int,
    minima: int,
    levels: int,
    threads: int,
) -> None: ...
def rms_norm(
    x: int,
    dtype: int,
    rows: int,
    columns: int,
    stride: int,
    weight: int,
    out: int,
    eps: float,
    threads: int,
) -> None: ...
def rotate(
    x: int,
    dtype: int,
    tokens: int,
    heads: int,
    half: int,
    stride: int,
    cos: int,
    sin: int,
    interleaved: bool,
    out: int,
    threads: int,
) -> None: ...
def swiglu(gate: int, up: int, dtype: int, count: int, out: int, threads: int) -> None: ...
def store(
    x: int,
    dtype: int,
    tokens: int,
    width: int,
    stride: int,
    cache: int,
    cache_dtype: int,
    num_places: int,
    places: int,
    threads: int,
) -> None: ...
def store_int8(
    x: int,
    dtype: int,
    tokens: int,
    heads: int,
    head_dim: int,
    stride: int,
    cache: int,
    scales: int,
    num_places: int,
    places: int,
    threads: int,
) -> None: ...

class Decoder:
    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        intermediate: int,
        norm_eps: float,
        attention_scale: float,
        dtype: int,
    ) -> None: ...
    def add_layer(
        self,
        input_norm: int,
        post_attention_norm: int,
        matrices: Sequence[QuantMatrix | None],
        dense: Sequence[tuple[int, int, int]],
    ) -> None: ...
    def run(
        self,
        x: int,
        tokens: int,
        cos: int,
        sin: int,
        batch: PagedBatch,
        places: int,
        keys: Sequence[int],
        values: Sequence[int],
        key_scales: Sequence[int],
        value_scales: Sequence[int],
        cache_dtype: int,
        cache_size: int,
        threads: int,
    ) -> None: ...

class PagedBatch:
    def __init__(
        self, block_tables: Tensor, starts: Tensor, counts: Tensor, num_blocks: int, block_size: int
    ) -> None: ...
    def attend(
        self,
        q: int,
        dtype: int,
        tokens: int,
        heads: int,
        head_dim: int,
        q_stride: int,
        keys: int,
        values: int,
        key_scales: int,
        value_scales: int,
        cache_dtype: int,
        kv_heads: int,
        cache_size: int,
        out: int,
        scale: float,
        chunk_size: int,
        threads: int,
    ) -> None: ...
