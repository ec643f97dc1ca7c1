// Program -> the steps of a call, their weights packed, and an arena's layout.
#pragma once
#include <cstddef>
#include <memory>
#include <vector>

#include "kernels.h"
#include "program.h"

namespace native {

// Zeroed memory aligned to pages.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  uint8_t* get() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

struct Plan {
  // Decides what is computed together (nothing where `keeps_tensors`), packs the weights and places the maps.
  Plan(Program& program, const Kernels& kernels, bool keeps_tensors);

  std::vector<Step> steps;
  std::vector<Map> maps;    // of each tensor; start is meaningful while it lives
  size_t arena_bytes = 0;
  size_t scratch_bytes = 0; // of a thread
  int most_channels = 0;

 private:
  void make_maps(const Program& program, const Kernels& kernels);
  void make_steps(const Program& program, bool fuses);
  void pack(Program& program, const Kernels& kernels);
  void place(const Program& program, bool keeps_tensors);

  Memory weights_;
};

}  // namespace native
