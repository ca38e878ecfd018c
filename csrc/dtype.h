// The types of activations.
#pragma once

namespace puna {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

constexpr int dtype_bytes(Dtype d) { return d == Dtype::f32 ? 4 : 2; }

}  // namespace puna
