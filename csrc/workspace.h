// Memory that a thread keeps for its next call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace puna {

class Workspace {
 public:
  static constexpr int64_t kAlign = 64;

  // Return room for so many bytes; what was there before is lost. Raises std::bad_alloc.
  uint8_t* take(int64_t bytes) {
    if (bytes > size_) {
      kept_.reset();
      size_ = 0;
      const int64_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
      kept_.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlign, static_cast<size_t>(rounded))));
      if (kept_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return kept_.get();
  }

 private:
  struct Freed {
    void operator()(uint8_t* p) const { std::free(p); }
  };

  std::unique_ptr<uint8_t, Freed> kept_;
  int64_t size_ = 0;
};

}  // namespace puna
