// Convolution by groups of 32 output channels. Included inside each file's own namespace, after its Products.
//
// Products::compute makes the sums of up to 32 pixels x 32 channels in a scratch that stays in L1 (4 KB); the epilogue of one such
// unit is done while the next one's products run.

// Where a convolution reads: `segments` runs of `length` output pixels. A 1x1 convolution over a map without halo has one run.
struct Source {
  const uint8_t* start;   // what the first output's kernel sees first
  int64_t pixel;          // from one output's to the next's
  int64_t segment;        // from one run's to the next's
  int64_t kernel_row;
  int segments, length;
};

struct ConvScratch {
  alignas(64) int32_t sums[2][RUN * CONV_GROUP];
};

template <class E, bool IS_BF16, class P = Products>
static void conv_units(const Packed& p, int group, const Source& source, const Target& target, void* totals, ConvScratch& scratch, Prefetch& prefetch) {
  const E epilogue(p, group * CONV_GROUP, totals);
  Pending<E> pending{epilogue, target, prefetch};
  const uint8_t* weights = p.weights + size_t(group) * p.group_bytes;
  const int32_t* bias = reinterpret_cast<const int32_t*>(p.bias) + group * CONV_GROUP;
  if constexpr (P::FINISHES && !IS_BF16) {
    Target t = target;
    for (int s = 0; s < source.segments; s++)
      P::finish(p, source.start + s * source.segment, source.pixel, source.kernel_row, source.length, weights, bias, epilogue, t, prefetch);
    return;
  }
  const int steps = Products::steps(p);
  int flip = 0;
  for (int s = 0; s < source.segments; s++) {
    const uint8_t* from = source.start + s * source.segment;
    for (int x = 0; x < source.length; x += RUN, from += RUN * source.pixel) {
      const int count = source.length - x < RUN ? source.length - x : RUN;
      int32_t* sums = scratch.sums[flip];
      flip ^= 1;
      Products::compute<IS_BF16>(p, from, source.pixel, source.kernel_row, count, weights, bias, sums, pending);
      pending.flush();
      pending.begin(sums, count, steps);
    }
  }
  pending.flush();
}

template <int MODE>
static void conv_group(const Packed& p, int group, const Source& source, const Target& target, void* totals, ConvScratch& scratch, Prefetch& prefetch) {
  if (p.is_bf16) conv_units<FloatEpilogue<MODE>, true>(p, group, source, target, totals, scratch, prefetch);
  else conv_units<Epilogue<MODE>, false>(p, group, source, target, totals, scratch, prefetch);
}

static void conv_group(const Packed& p, int group, const Source& source, const Target& target, bool has_residual, ConvScratch& scratch, Prefetch& prefetch) {
  const bool is_active = p.layer->activation != NONE;
  if (is_active && has_residual) conv_group<TABLE_RESIDUAL>(p, group, source, target, nullptr, scratch, prefetch);
  else if (is_active && p.is_ramp) conv_group<RAMP>(p, group, source, target, nullptr, scratch, prefetch);
  else if (is_active) conv_group<TABLE>(p, group, source, target, nullptr, scratch, prefetch);
  else if (has_residual) conv_group<LINE_RESIDUAL>(p, group, source, target, nullptr, scratch, prefetch);
  else conv_group<LINE>(p, group, source, target, nullptr, scratch, prefetch);
}
