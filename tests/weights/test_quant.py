"""Packed weights: values against the gguf package and hand-made blocks, modules against their float twins."""

from __future__ import annotations

import copy
import pickle

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from puna import kernels
from puna.errors import UnsupportedError
from puna.gguf_header import GGMLType
from puna.kernels.reference import round_activations
from puna.model import Llama, LlamaConfig, PackedAttention
from puna.model.moe import Experts
from puna.weights import packed_matrix
from puna.weights.packed_matrix import PackedMatrix, QuantTensor
from puna.weights.quant import QuantEmbedding, QuantExperts, QuantLinear, ShapeError, swap_in

# Where each type keeps its float16 scales.
SCALES = {
    GGMLType.Q8_0: (0,),
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
}
PLAIN = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
EXTREMES = (0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, 1.0)


def random_rows(
    kind: GGMLType, *rows: int, blocks: int = 2, seed: int = 0, scale: float = 0.01
) -> QuantTensor:
    """Make packed rows of random blocks whose scales are random and finite."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (*rows, blocks, kind.type_size), dtype=np.uint8)
    for at in SCALES[kind]:
        scales = (scale * rng.standard_normal((*rows, blocks, 1))).astype(np.float16)
        data[..., at : at + 2] = scales.view(np.uint8)
    return QuantTensor(torch.from_numpy(data.reshape(*rows, -1)), kind)


def reference(data: npt.NDArray[np.uint8], kind: GGMLType) -> npt.NDArray[np.float32]:
    """Dequantise with the gguf package."""
    with np.errstate(all="ignore"):
        values: npt.NDArray[np.float32] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(int(kind)))
    return values


@pytest.mark.parametrize("kind", [*SCALES, *PLAIN])
@pytest.mark.parametrize("rows", [1, 7, 61])
def test_values_equal_the_gguf_package_bit_for_bit(kind: GGMLType, rows: int) -> None:
    blocks = max(3, 256 // kind.block_size)
    data = np.random.default_rng(rows).integers(0, 256, (rows, blocks * kind.type_size), dtype=np.uint8)
    expected = reference(data, kind)
    got = QuantTensor(torch.from_numpy(data), kind).dequantize().numpy()
    same_bits = got.view(np.uint32) == expected.view(np.uint32)
    assert np.all(same_bits | (np.isnan(got) & np.isnan(expected)))


@pytest.mark.parametrize("kind", list(SCALES))
def test_extreme_scales_are_exact_too(kind: GGMLType) -> None:
    data = np.random.default_rng(1).integers(0, 256, (len(EXTREMES) ** 2, kind.type_size), dtype=np.uint8)
    for place, at in enumerate(SCALES[kind]):
        scales = np.array(EXTREMES, dtype=np.float16)
        scales = np.tile(scales, len(EXTREMES)) if place else np.repeat(scales, len(EXTREMES))
        data[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    got = QuantTensor(torch.from_numpy(data), kind).dequantize().numpy()
    assert np.array_equal(got.view(np.uint32), reference(data, kind).view(np.uint32))


def test_more_blocks_than_one_run() -> None:
    weight = random_rows(GGMLType.Q4_K, 5, 250, blocks=3)
    expected = reference(weight.data.numpy(), GGMLType.Q4_K)
    assert np.array_equal(weight.dequantize().numpy(), expected)


def test_a_q4_0_block_by_hand() -> None:
    scale = np.array([0.5], dtype=np.float16).view(np.uint8).tolist()
    packed = torch.tensor([[*scale, 0xF0, *[0x88] * 15]], dtype=torch.uint8)
    values = QuantTensor(packed, GGMLType.Q4_0).dequantize()
    expected = torch.zeros(1, 32)
    expected[0, 0], expected[0, 16] = -4.0, 3.5
    assert torch.equal(values, expected)


def test_a_q6_k_block_by_hand() -> None:
    block = np.zeros(210, dtype=np.uint8)
    block[128:192] = 0b10101010  # upper bits 2: every value is 32 - 32 = 0
    block[0] = 0x05  # element 0 gets 5, element 64 gets 0
    block[192] = 0xFE  # the scale of elements 0 to 15 is -2
    block[208:210] = np.array([0.25], dtype=np.float16).view(np.uint8)
    values = QuantTensor(torch.from_numpy(block[None]), GGMLType.Q6_K).dequantize()
    expected = torch.zeros(1, 256)
    expected[0, 0] = 0.25 * -2 * 5
    assert torch.equal(values, expected)


# Wrong in the package (Q8_1), or not in it yet (Q2_0).
@pytest.mark.parametrize("kind", sorted(set(GGMLType) - {GGMLType.Q8_1, GGMLType.Q2_0}))
def test_block_sizes_equal_the_gguf_package(kind: GGMLType) -> None:
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(kind))]
    assert (kind.block_size, kind.type_size) == sizes


def test_types_without_a_formula_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="IQ2_XXS"):
        QuantTensor(torch.zeros(1, 66, dtype=torch.uint8), GGMLType.IQ2_XXS)


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 18"):
        QuantTensor(torch.zeros(1, 17, dtype=torch.uint8), GGMLType.Q4_0)


def test_rows_are_selected_and_reordered_by_bytes() -> None:
    weight = random_rows(GGMLType.Q5_K, 3, 6)
    order = torch.tensor([5, 0, 3])
    assert torch.equal(weight.rows(order).dequantize(), weight.dequantize()[:, order])
    assert torch.equal(weight.rows(slice(1, 4)).dequantize(), weight.dequantize()[:, 1:4])
    assert weight.rows(order).shape == (3, 3, 512)


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_linear_equals_the_dequantised_one(
    dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_matrix, "_CHUNK", 5 * 512)  # 5 rows at a time, 13 is no multiple
    weight = random_rows(GGMLType.Q4_K, 13)
    bias = nn.Parameter(torch.randn(13, dtype=dtype))
    x = torch.randn(tokens, 512).to(dtype)
    got = QuantLinear(weight, bias)(x)
    expected = functional.linear(x, weight.dequantize().to(dtype)) + bias
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-4)


@pytest.mark.usefixtures("reference_kernels")
def test_linear_never_holds_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_matrix, "_CHUNK", 4 * 512)
    weight = random_rows(GGMLType.Q4_K, 13)
    sizes = []
    original = functional.linear

    def watched(x: Tensor, w: Tensor) -> Tensor:
        sizes.append(w.shape[0])
        return original(x, w)

    monkeypatch.setattr(functional, "linear", watched)
    PackedMatrix(weight)(torch.randn(2, 512))
    assert sizes == [4, 4, 4, 1]


def test_gradients_flow_through_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_matrix, "_CHUNK", 5 * 512)
    weight = random_rows(GGMLType.Q6_K, 13)
    layer = QuantLinear(weight, nn.Parameter(torch.zeros(13)))
    x = torch.randn(2, 3, 512, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    upstream = torch.randn(2, 3, 13)
    assert layer.bias is not None
    got, bias_grad = torch.autograd.grad(layer(x), (x, layer.bias), upstream)
    (expected,) = torch.autograd.grad(functional.linear(twin, weight.dequantize()), twin, upstream)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(bias_grad, upstream.sum((0, 1)))


@pytest.mark.usefixtures("reference_kernels")
def test_embedding_and_its_tied_head() -> None:
    weight = random_rows(GGMLType.Q3_K, 11)
    table = QuantEmbedding(weight, torch.bfloat16)
    ids = torch.tensor([[3, 10], [3, 0]])
    assert torch.equal(table(ids), weight.dequantize().bfloat16()[ids])
    assert table.float()(ids).dtype == torch.float32  # follows the model's dtype
    hidden = torch.randn(2, 512)
    expected = hidden @ weight.dequantize().T
    torch.testing.assert_close(table.logits(hidden), expected)


def small_config(**changes: object) -> LlamaConfig:
    values = {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if changes.get("model_type") == "llama4_text":
        values |= {"num_local_experts": 3, "head_dim": 64, "num_experts_per_tok": 2}
    return LlamaConfig.from_hf({**values, **changes})


@pytest.mark.usefixtures("reference_kernels")
def test_experts_equal_their_float_twin() -> None:
    float_experts = Experts(small_config(model_type="llama4_text"))
    kinds = {"gate_proj": GGMLType.Q4_K, "up_proj": GGMLType.Q6_K, "down_proj": GGMLType.Q5_K}
    weights = {name: random_rows(kind, 3, 256, blocks=1) for name, kind in kinds.items()}
    gate, up, down = (weight.dequantize().transpose(1, 2) for weight in weights.values())
    with torch.no_grad():
        float_experts.gate_up_proj.copy_(torch.cat((gate, up), dim=-1))
        float_experts.down_proj.copy_(down)
    packed = QuantExperts.like(float_experts)
    for name, weight in weights.items():
        packed.put(name, weight)
    generator = torch.Generator().manual_seed(0)
    x, scores = torch.randn(5, 256, generator=generator), torch.rand(5, 2, generator=generator)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [0, 2]])
    expected = float_experts(x, scores, chosen)
    # large terms cancel, and the two sum them in another order: measure against the largest
    torch.testing.assert_close(
        packed(x, scores, chosen), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max())
    )


def run(model: Llama) -> Tensor:
    ids = torch.tensor([1, 5, 39])
    with torch.no_grad():
        logits: Tensor = model(ids, torch.arange(3), PackedAttention([0, 3]))
    return logits


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("tied", [True, False])
def test_swapped_model_computes_what_the_float_one_does(tied: bool) -> None:
    torch.manual_seed(0)
    model = Llama(small_config(tie_word_embeddings=tied)).eval()
    shapes = {n: p.shape for n, p in model.state_dict().items() if p.dim() == 2}
    weights = {
        n: random_rows(GGMLType.Q4_K, s[0], blocks=1, seed=i) for i, (n, s) in enumerate(shapes.items())
    }
    model.load_state_dict({n: w.dequantize() for n, w in weights.items()}, strict=False)
    expected = run(model)
    for name, weight in weights.items():
        swap_in(model, name, weight)
    assert sum(p.numel() for p in model.parameters()) == 3 * 256  # only the norms are left
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-3)


def test_swapped_experts_show_what_is_missing() -> None:
    with torch.device("meta"):
        model = Llama(small_config(model_type="llama4_text"))
    prefix = "model.layers.0.feed_forward.experts."
    for name in ("gate_proj", "down_proj"):
        swap_in(model, prefix + name, random_rows(GGMLType.Q4_K, 3, 256, blocks=1))
    left = [name for name, tensor in model.state_dict().items() if "experts." in name and tensor.is_meta]
    assert left == [prefix + "up_proj"]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 255, r"expected the shape \[256, 256\], got \[255, 256\]"),
        ("model.embed_tokens.weight", 41, r"expected the shape \[40, 256\], got \[41, 256\]"),
        ("model.norm.weight", 1, "RMSNorm.weight cannot hold"),
        ("model.layers.7.self_attn.q_proj.weight", 256, "no such module"),
        ("model.layers.0.self_attn.q_proj.bias", 256, "cannot hold"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name: str, rows: int, message: str) -> None:
    model = Llama(small_config())
    kind = ShapeError if "shape" in message else ValueError
    with pytest.raises(kind, match=message):
        swap_in(model, name, random_rows(GGMLType.Q4_K, rows, blocks=1))


def test_modules_describe_themselves() -> None:
    weight = random_rows(GGMLType.Q4_K, 4, blocks=1)
    assert "4, 256, type=Q4_K" in repr(QuantLinear(weight))
    assert "bias=False" in repr(QuantLinear(weight))
    assert "4, 256, type=Q4_K" in repr(QuantEmbedding(weight))


needs_compiled = pytest.mark.skipif(kernels.compiled() is None, reason="the compiled kernels are not there")


# torch derives its own operations with torch.jit, which it deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@needs_compiled
def test_tangents_flow_through_packed_weights() -> None:
    weight = random_rows(GGMLType.Q6_K, 13)
    x, tangent = torch.randn(2, 3, 512)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)  # type: ignore[no-untyped-call]
        out = forward_ad.unpack_dual(QuantLinear(weight)(dual))  # type: ignore[no-untyped-call]
        torch.testing.assert_close(out.tangent, tangent @ weight.dequantize().T)


@needs_compiled
@pytest.mark.parametrize("kind", list(SCALES))
def test_compiled_modules_differ_by_the_rounding_of_activations_only(kind: GGMLType) -> None:
    weight = random_rows(kind, 37)
    width = weight.shape[1]
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    exact = round_activations(x) @ weight.dequantize(torch.float64).T
    largest = float(exact.abs().max())
    for got in (QuantLinear(weight)(x), QuantEmbedding(weight).logits(x)):
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-6 * largest)


@needs_compiled
def test_tiles_hand_out_the_rows_that_they_were_made_of() -> None:
    weight = random_rows(GGMLType.Q5_K, 21)
    matrix = PackedMatrix(weight)
    assert matrix.packed.ndim == 1  # tiles
    assert torch.equal(matrix.quantized.data, weight.data)
    order = torch.tensor([20, 3, 3])
    assert torch.equal(matrix.rows(order).data, weight.data[order])
    assert torch.equal(QuantEmbedding(weight)(order), weight.dequantize()[order])


@needs_compiled
def test_a_matrix_becomes_rows_when_it_leaves_the_cpu() -> None:
    weight = random_rows(GGMLType.Q4_0, 21)
    matrix = PackedMatrix(weight).to("meta")
    assert matrix.packed.shape == weight.data.shape and matrix.packed.device.type == "meta"


@needs_compiled
def test_the_default_device_does_not_matter() -> None:
    weight, x = random_rows(GGMLType.Q4_0, 21), torch.randn(2, 64)
    with torch.device("meta"):
        matrix = PackedMatrix(weight).float()
        assert torch.equal(matrix.quantized.data, weight.data)
        assert torch.equal(matrix(x), PackedMatrix(weight)(x))


@needs_compiled
@pytest.mark.parametrize("how", ["copied", "pickled", "cloned"])
def test_a_copied_matrix_computes_the_same(how: str) -> None:
    matrix = PackedMatrix(random_rows(GGMLType.Q6_K, 21))
    x = torch.randn(2, matrix.in_features)
    expected = matrix(x)
    if how == "cloned":
        other = matrix._apply(torch.Tensor.clone)
    else:
        other = copy.deepcopy(matrix) if how == "copied" else pickle.loads(pickle.dumps(matrix))
    matrix = matrix if how == "cloned" else PackedMatrix(random_rows(GGMLType.Q6_K, 21, seed=5))
    assert torch.equal(other(x), expected)


@needs_compiled
def test_tiles_may_move_into_shared_memory() -> None:
    # As sending a model to another process does.
    matrix = PackedMatrix(random_rows(GGMLType.Q6_K, 21))
    x = torch.randn(2, matrix.in_features)
    expected = matrix(x)
    matrix.packed.share_memory_()  # type: ignore[no-untyped-call]
    assert torch.equal(matrix(x), expected)
    matrix.packed.zero_()
    assert matrix(x).eq(0).all()


@needs_compiled
@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_computed_with(assign: bool) -> None:
    matrix, other = (PackedMatrix(random_rows(GGMLType.Q6_K, 21, seed=seed)) for seed in (0, 1))
    matrix.load_state_dict(other.state_dict(), assign=assign)
    x = torch.randn(2, matrix.in_features)
    assert torch.equal(matrix(x), other(x))


@needs_compiled
def test_one_token_equals_itself_among_others_bit_for_bit() -> None:
    x = torch.randn(9, 512)
    for kind in SCALES:
        matrix = PackedMatrix(random_rows(kind, 21, blocks=512 // kind.block_size))
        together = matrix(x)
        alone = torch.cat([matrix(x[i : i + 1]) for i in range(9)])
        assert torch.equal(together, alone), kind
