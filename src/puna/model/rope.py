"""Rotary position embedding: a position turns each pair of a head's elements by an angle.

Llama 2 and 3 in Hugging Face's row order pair element i with i + head_dim/2; Llama 4 pairs 2i with 2i + 1.
The frequencies of every scaling type follow Transformers 5.23 (`modeling_rope_utils.py`), all in float32.
The rotation itself: `puna.kernels.layer_ops`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from puna.model.config import RopeConfig


class Rope(nn.Module):
    """Give cosines and sines for positions. It has no weights; frequencies are made on first use."""

    def __init__(self, config: RopeConfig, head_dim: int, max_position_embeddings: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self._inverse: Tensor | None = None

    @property
    def needs_lengths(self) -> bool:
        """Say whether the frequencies depend on how long each sequence is."""
        return self.config.rope_type == "dynamic"

    def forward(self, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each (tokens, 1, head_dim / 2) in float32.

        positions, lengths: (tokens,) integers; lengths are those of the sequence each token belongs to.
        """
        if self._inverse is None or self._inverse.device != positions.device:
            frequencies = inverse_frequencies(self.config, self.head_dim)
            self._inverse = frequencies.to(positions.device)
        inverse = self._inverse
        if self.needs_lengths and lengths is not None:
            inverse = self._stretched(lengths)
        angles = positions[:, None].float() * inverse
        scale = attention_factor(self.config)
        return (angles.cos() * scale).unsqueeze(1), (angles.sin() * scale).unsqueeze(1)

    def _stretched(self, lengths: Tensor) -> Tensor:
        """Return dynamic-NTK frequencies for each token, (tokens, head_dim / 2)."""
        dim, factor, longest = self.head_dim, self.config.factor, self.max_position_embeddings
        ratio = factor * lengths.clamp(min=longest).float() / longest - (factor - 1)
        base = self.config.rope_theta * ratio ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=lengths.device).float() / dim
        return 1.0 / base[:, None] ** exponents


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Return the angle per position of each pair, (head_dim / 2,) in float32, on the CPU.

    For `dynamic` these are the frequencies up to max_position_embeddings.
    """
    exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
    inverse = 1.0 / (config.rope_theta**exponents)
    if config.freq_factors is not None:
        inverse = inverse / torch.tensor(config.freq_factors, dtype=torch.float32, device="cpu")
    if config.rope_type == "linear":
        return inverse / config.factor
    if config.rope_type == "llama3":
        return _llama3(inverse, config)
    if config.rope_type == "yarn":
        return _yarn(inverse, config, head_dim)
    return inverse


def _llama3(inverse: Tensor, config: RopeConfig) -> Tensor:
    """Keep short waves, divide long ones by the factor, blend between."""
    original = config.original_max_position_embeddings
    assert original is not None
    low, high, factor = config.low_freq_factor, config.high_freq_factor, config.factor
    wavelength = 2 * math.pi / inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, inverse)
    if low == high:  # Llama 4 Scout: nothing lies between
        return scaled
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, blended, scaled)


def _yarn(inverse: Tensor, config: RopeConfig, dim: int) -> Tensor:
    """Interpolate the slow pairs, extrapolate the fast ones, ramp between (arXiv 2309.00071)."""
    original = config.original_max_position_embeddings
    assert original is not None

    def pair_with(rotations: float) -> float:
        return (
            dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )  # fractional

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, device="cpu").float() - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return inverse / config.factor * (1 - keep) + inverse * keep


def attention_factor(config: RopeConfig) -> float:
    """Return what cosines and sines are multiplied by: 1, but for yarn."""
    if config.rope_type != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor

    def magnitude(scale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * scale * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return magnitude(config.mscale) / magnitude(config.mscale_all_dim)
    return magnitude(1.0)
