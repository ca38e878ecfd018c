"""The threads of the compiled kernels: one pool, as many as torch's, and none that a fork has lost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from puna.gguf_header import GGMLType

cpu = pytest.importorskip(
    "puna.kernels.cpu", reason="the compiled kernels were not built", exc_type=ImportError
)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_one_pool_of_threads() -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not list what is loaded")
    # In a process of its own: other packages of the test run may bring OpenMP libraries.
    code = "import puna.kernels.cpu; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    pools = {line.split()[-1] for line in maps.splitlines() if "gomp" in line or "iomp" in line}
    assert len(pools) <= 1, pools


@pytest.mark.usefixtures("three_threads")
def test_kernels_use_as_many_threads_as_torch_in_every_thread() -> None:
    # OpenMP's own number belongs to one thread; an engine often runs in another than the one that set it.
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(cpu.num_threads()))
    thread.start()
    thread.join()
    assert seen == [3] and cpu.num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_threads_do_not_change_the_result() -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 100, (600, 256 // 32 * 18), dtype=torch.uint8, generator=generator)
    dense = torch.randn(600, 256, generator=generator).bfloat16()
    weight = cpu.TiledWeight.pack(packed, GGMLType.Q4_0)
    for tokens in (1, 2, 9, 300):
        x = torch.randn(tokens, 256, generator=generator)
        results = []
        for threads in (3, 1):
            torch.set_num_threads(threads)
            results.append((*cpu.quant_linear(x, [weight, weight]), *cpu.dense_linear(x, [dense, dense])))
        assert all(torch.equal(several, one) for several, one in zip(*results, strict=True))
    assert torch.equal(weight.rows(torch.arange(600)), packed)


def test_wrong_numbers_of_threads_are_refused() -> None:
    weight = cpu.TiledWeight.pack(torch.zeros(16, 18, dtype=torch.uint8), GGMLType.Q4_0)
    out = torch.empty(1, 18, dtype=torch.uint8)
    for threads in (0, -1, 1 << 20):
        with pytest.raises(ValueError, match=f"threads is {threads}"):
            weight.matrix.unpack(torch.tensor([3]), out, threads)


FORK = """
import os, warnings, torch
from puna.gguf_header import GGMLType
from puna.kernels import cpu
warnings.simplefilter("ignore")
torch.set_num_threads(2)
weight = cpu.TiledWeight.pack(torch.full((1024, 18 * 8), 9, dtype=torch.uint8), GGMLType.Q4_0)
x = torch.ones(4, 256)
before = cpu.quant_linear(x, [weight])[0]
child = os.fork()
if child == 0:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        same = all(torch.equal(cpu.quant_linear(x, [weight])[0], before) for _ in range(2))
    os._exit(0 if same and len(told) == 1 and cpu.num_threads() == 1 else 1)
assert os.waitpid(child, 0)[1] == 0 and cpu.num_threads() == 2
assert torch.equal(cpu.quant_linear(x, [weight])[0], before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)
