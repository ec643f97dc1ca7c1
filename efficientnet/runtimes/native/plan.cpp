// What is computed together: a 3x3 convolution and the projection behind it (the expanded map stays in L1), an expansion (or the stem) and the
// depthwise convolution behind it (group of channels by group of channels, in L2), the head and its mean. See docs/native.md.
#include "plan.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace native {
namespace {

// A pixel's bytes: aligned as far as a kernel row of it keeps its number of blocks, so that few rows of a tile cross a line of the cache (of
// 48 channels, three in four did).
size_t padded(size_t bytes, int kernel, int block_bytes) {
  auto blocks = [&](size_t pixel) { return (size_t(kernel) * pixel + size_t(block_bytes) - 1) / size_t(block_bytes); };
  auto aligned = [&](size_t unit) { return (bytes + unit - 1) / unit * unit; };
  size_t unit = 64;
  while (unit > 4 && blocks(aligned(unit)) > blocks(aligned(4))) unit /= 2;
  return aligned(unit);
}

// Where the first of a layer's arrays begins in the blob.
int64_t first_array(const Layer& l, int64_t first) {
  for (int64_t at : {l.weights, l.bias, l.scales, l.table, l.squeeze_weights, l.squeeze_bias, l.excite_weights, l.excite_bias})
    if (at >= 0) first = std::min(first, at);
  return first;
}

}  // namespace

#ifdef __SANITIZE_ADDRESS__
// From the allocator whose ends are watched.
Memory::Memory(size_t bytes) : data_(static_cast<uint8_t*>(aligned_alloc(4096, (bytes + 4096) / 4096 * 4096))), bytes_(bytes) {
  if (!data_) throw std::bad_alloc();
  memset(data_, 0, bytes);
}

Memory::~Memory() { free(data_); }
#else
Memory::Memory(size_t bytes) : bytes_((bytes + 4095) / 4096 * 4096) {
  void* data = mmap(nullptr, bytes_ ? bytes_ : 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(data);
#ifdef MADV_HUGEPAGE
  // Weights and maps are walked through at every call: 2 MB pages spare its misses of the TLB.
  if (bytes_ >= (size_t(2) << 20)) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}

Memory::~Memory() {
  if (data_) munmap(data_, bytes_ ? bytes_ : 4096);
}
#endif

Memory::Memory(Memory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Plan::Plan(Program& program, const Kernels& kernels, bool keeps_tensors) {
  make_maps(program, kernels);
  make_steps(program, kernels.fuses && !keeps_tensors);
  pack(program, kernels);
  place(program, keeps_tensors);
  for (const Step& step : steps) scratch_bytes = std::max(scratch_bytes, kernels.scratch_bytes(step));
  size_t pixel_bytes = 0;
  for (const Map& map : maps) pixel_bytes = std::max(pixel_bytes, map.pixel_bytes);
  arena_bytes += SLACK + SLACK_PIXELS * pixel_bytes;
  scratch_bytes += SLACK + SLACK_PIXELS * pixel_bytes;
}

void Plan::make_maps(const Program& program, const Kernels& kernels) {
  maps.resize(program.tensors.size());
  for (size_t i = 0; i < maps.size(); i++) {
    const Tensor& tensor = program.tensors[i];
    Map& map = maps[i];
    map.height = tensor.height;
    map.width = tensor.width;
    map.channels = tensor.channels;
    map.is_bf16 = tensor.type == BF16;
    map.zero_point = tensor.zero_point;
    most_channels = std::max(most_channels, map.channels);
  }
  for (const Layer& layer : program.layers) {
    if (layer.kind == CONV) maps[size_t(layer.input)].halo = std::max(maps[size_t(layer.input)].halo, layer.kernel / 2);
    if (layer.kind == INPUT) {
      Map& map = maps[size_t(layer.output)];
      map.has_padding = true;
      std::copy_n(program.blob<int32_t>(layer.table), 3, map.padding);
    }
  }
  for (size_t i = 0; i < maps.size(); i++) {
    Map& map = maps[i];
    const size_t value = program.tensors[i].value_bytes();
    // The input's pixels get a fourth channel of zeros and are written as words.
    map.pixel_bytes = map.has_padding ? 4 * value : padded(value * size_t(map.channels), 2 * map.halo + 1, kernels.block_bytes);
    map.row_bytes = size_t(map.width + map.halo) * map.pixel_bytes;
  }
}

void Plan::make_steps(const Program& program, bool fuses) {
  std::vector<int> num_readers(program.tensors.size(), 0);
  for (const Layer& layer : program.layers) {
    if (layer.input >= 0) num_readers[size_t(layer.input)]++;
    if (layer.residual >= 0) num_readers[size_t(layer.residual)]++;
  }
  const auto& layers = program.layers;
  // Whether the layer behind is the only one that reads what layer i makes.
  auto feeds_next = [&](size_t i) {
    return i + 1 < layers.size() && layers[i + 1].input == layers[i].output && num_readers[size_t(layers[i].output)] == 1;
  };
  auto is_pointwise = [](const Layer& layer) { return layer.kind == CONV && layer.kernel == 1 && layer.stride == 1; };
  for (size_t i = 0; i < layers.size(); i++) {
    const Layer* layer = &layers[i];
    Step step;
    step.program = &program;
    if (layer->input >= 0) step.in = maps[size_t(layer->input)];
    const bool has_next = fuses && feeds_next(i) && layer->residual == -1;
    if (has_next && layer->kind == CONV && layer->activation != NONE && layers[i + 1].kind == DEPTHWISE) {
      step.expand.layer = layer;
      layer = &layers[++i];
    } else if (has_next && layer->kind == CONV && layer->kernel > 1 && is_pointwise(layers[i + 1]) &&
               layers[i + 1].activation == NONE) {
      step.expanded = program.tensors[size_t(layer->output)].channels;
      step.project.layer = &layers[++i];
    }
    const Layer& last = step.project.layer ? *step.project.layer : *layer;
    step.kind = Kind(layer->kind);
    step.main = layer;
    step.layer = int(i);
    if (layer->input >= 0) step.seen = maps[size_t(layer->input)];
    if (last.output >= 0) step.out = maps[size_t(last.output)];
    if (last.residual >= 0) {
      step.has_residual = true;
      step.residual = maps[size_t(last.residual)];
    }
    const Step* previous = steps.empty() ? nullptr : &steps.back();
    const bool is_summed = previous && previous->keeps_sums;
    if (fuses && i + 1 < layers.size() && feeds_next(i)) {
      const Kind next = Kind(layers[i + 1].kind);
      step.keeps_sums = (step.kind == DEPTHWISE && next == SQUEEZE_EXCITE) ||
                        (is_pointwise(*layer) && layer->activation != NONE && !step.has_residual && next == CLASSIFIER && step.in.is_contiguous());
    }
    if (step.kind == SQUEEZE_EXCITE || step.kind == CLASSIFIER) {
      step.phases = step.kind == SQUEEZE_EXCITE ? 3 : 2;
      step.first_phase = is_summed ? 1 : 0;
      if (is_summed)
        step.sums_units = previous->kind == DEPTHWISE ? step.in.height : (step.in.height * step.in.width + RUN - 1) / RUN;
      step.sums_group = is_summed && previous->kind == CONV ? CONV_GROUP : GROUP;
    }
    steps.push_back(step);
  }
}

void Plan::pack(Program& program, const Kernels& kernels) {
  struct Job {
    Packed* packed;
    const Layer* layer;
    Map in, out;
    size_t start;
  };
  std::vector<Job> jobs;
  size_t total = 0;
  auto add = [&](Packed& packed, const Layer* layer) {
    if (!layer) return;
    Job job{&packed, layer, maps[size_t(std::max(layer->input, 0))], maps[size_t(std::max(layer->output, 0))], total};
    total += (kernels.packed_bytes(program, *layer, job.in, job.out) + 63) / 64 * 64;
    jobs.push_back(job);
  };
  // In the order of use.
  for (Step& step : steps) {
    add(step.expand, step.expand.layer);
    add(step.packed, step.main);
    add(step.project, step.project.layer);
  }
  weights_ = Memory(total + SLACK);
  // The file goes as its weights come: what is in front of all that later layers read is given back.
  std::vector<int64_t> needed(jobs.size() + 1, program.blob_bytes());
  for (size_t i = jobs.size(); i-- > 0;) needed[i] = std::min(needed[i + 1], first_array(*jobs[i].layer, program.blob_bytes()));
  for (size_t i = 0; i < jobs.size(); i++) {
    const Job& job = jobs[i];
    job.packed->layer = job.layer;
    kernels.pack(program, *job.layer, job.in, job.out, weights_.get() + job.start, *job.packed);
    program.release(needed[i + 1]);
  }
}

void Plan::place(const Program& program, bool keeps_tensors) {
  const size_t n = maps.size();
  std::vector<int> first(n, -1), last(n, -1);
  std::vector<int> alias(n, -1);
  for (int s = 0; s < int(steps.size()); s++) {
    const Step& step = steps[size_t(s)];
    const Layer& head = step.expand.layer ? *step.expand.layer : *step.main;
    const Layer& tail = step.project.layer ? *step.project.layer : *step.main;
    if (head.input >= 0) last[size_t(head.input)] = s;
    if (tail.residual >= 0) last[size_t(tail.residual)] = s;
    const bool writes_map = tail.output >= 0 && !(step.keeps_sums && step.kind == CONV);
    if (writes_map) first[size_t(tail.output)] = last[size_t(tail.output)] = s;
    // The scaling by the gate is done where the map is, if nobody else wants it as it was.
    if (!keeps_tensors && step.kind == SQUEEZE_EXCITE) {
      bool is_read_later = false;
      for (size_t later = size_t(step.layer) + 1; later < program.layers.size(); later++)
        is_read_later |= program.layers[later].input == head.input || program.layers[later].residual == head.input;
      const Map &in = maps[size_t(head.input)], &out = maps[size_t(tail.output)];
      if (!is_read_later && in.halo == out.halo && in.is_bf16 == out.is_bf16) alias[size_t(tail.output)] = head.input;
    }
  }
  auto root = [&](int t) {
    while (alias[size_t(t)] >= 0) t = alias[size_t(t)];
    return t;
  };
  for (size_t t = 0; t < n; t++)
    if (alias[t] >= 0) last[size_t(root(int(t)))] = std::max(last[size_t(root(int(t)))], last[t]);
  // What is read past a bf16 pixel's last channel meets zero weights, and must be a number: bf16 maps share no memory with others.
  struct Block {
    size_t start, end;
    int first, last;
    bool is_bf16;
  };
  std::vector<Block> blocks;
  std::vector<int> order;
  for (size_t t = 0; t < n; t++)
    if (first[t] >= 0 && alias[t] < 0) order.push_back(int(t));
  std::sort(order.begin(), order.end(), [&](int a, int b) { return first[size_t(a)] < first[size_t(b)]; });
  // The lowest gap that is free for as long as the map lives: what was just written stays in the same few lines of the cache.
  for (int t : order) {
    Map& map = maps[size_t(t)];
    const size_t bytes = (map.bytes() + 4095) / 4096 * 4096;
    if (keeps_tensors) last[size_t(t)] = int(steps.size());
    std::vector<Block> live;
    for (const Block& b : blocks)
      if ((b.first <= last[size_t(t)] && first[size_t(t)] <= b.last) || b.is_bf16 != map.is_bf16) live.push_back(b);
    std::sort(live.begin(), live.end(), [](const Block& a, const Block& b) { return a.start < b.start; });
    size_t start = 0;
    for (const Block& b : live) {
      if (start + bytes <= b.start) break;
      start = std::max(start, b.end);
    }
    blocks.push_back({start, start + bytes, first[size_t(t)], last[size_t(t)], map.is_bf16});
    // The first pixel is aligned to a line of the cache.
    map.start = start + (map.start_in_block() + 63) / 64 * 64;
    arena_bytes = std::max(arena_bytes, start + bytes);
  }
  for (size_t t = 0; t < n; t++)
    if (alias[t] >= 0) maps[t].start = maps[size_t(root(int(t)))].start;
  for (Step& step : steps) {
    const Layer& head = step.expand.layer ? *step.expand.layer : *step.main;
    const Layer& tail = step.project.layer ? *step.project.layer : *step.main;
    if (head.input >= 0) step.in.start = maps[size_t(head.input)].start;
    if (tail.output >= 0) step.out.start = maps[size_t(tail.output)].start;
    if (tail.residual >= 0) step.residual.start = maps[size_t(tail.residual)].start;
  }
}

}  // namespace native
