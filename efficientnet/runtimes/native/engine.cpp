// The C interface: opens a program and runs calls. One thread at a time is in a program; all that a call needs was allocated on
// opening.
#include "engine.h"

#include <unistd.h>
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>

#include "levels.h"
#include "plan.h"
#include "pool.h"

using namespace native;

namespace {

constexpr int MAX_THREADS = 64;
constexpr int MAX_BATCH = 65536;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Denormal floats cost a hundred cycles each and mean nothing here.
class FlushDenormals {
 public:
#ifdef __x86_64__
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

// Writes the padding around a map; each part does the rows it would write.
void fill_halo(const Map& map, uint8_t* arena, int part, int parts) {
  uint8_t* pixels = arena + map.start;
  if (map.is_bf16 && part == 0)  // kernels read past the last pixel, and zero times what is no number is no number
    memset(pixels + int64_t(map.height - 1 + map.halo) * int64_t(map.row_bytes) + int64_t(map.row_bytes), 0, 128);
  if (map.halo == 0) return;
  auto fill = [&](uint8_t* to, size_t num_pixels) {
    if (!map.has_padding || map.is_bf16) {
      memset(to, map.is_bf16 ? 0 : map.zero_point, num_pixels * map.pixel_bytes);
    } else {
      for (size_t i = 0; i < num_pixels; i++)
        for (size_t c = 0; c < map.pixel_bytes; c++) to[i * map.pixel_bytes + c] = c < 3 ? uint8_t(map.padding[c]) : 0;
    }
  };
  const int height = map.height + 2 * map.halo;
  const int first = height * part / parts, end = height * (part + 1) / parts;
  const int64_t halo = map.halo, row = int64_t(map.row_bytes), margin = halo * int64_t(map.pixel_bytes);
  for (int64_t y = first - halo; y < end - halo; y++) {
    uint8_t* start = pixels + y * row - margin;
    if (y < 0 || y >= map.height) fill(start, size_t(map.width + map.halo));
    else fill(start, size_t(map.halo));
  }
  // The right margin of the last row has no row below it.
  if (part == parts - 1) fill(pixels + (map.height - 1 + halo) * row + row - margin, size_t(map.halo));
}

int refuse(char* error, size_t error_bytes, const std::string& what) {
  if (error && error_bytes) snprintf(error, error_bytes, "%s", what.c_str());
  return 1;
}

}  // namespace

// An arena, and the barrier of those who work on its image.
struct Team {
  Memory arena, shared;
  Barrier barrier;
};

struct engine {
  engine(const void* file, size_t file_bytes, const Kernels& chosen, int threads, int max_batch, int flags);
  void run_image(Team& team, int thread, int image, int part, int parts);
  void run_part(int part);
  size_t image_bytes(bool is_pixels) const;

  Program program;
  const Kernels& kernels;
  const int flags, max_batch;
  Plan plan;
  size_t sums_stride = 0;
  std::vector<std::unique_ptr<Team>> teams;
  std::vector<Memory> scratch;
  std::vector<double> times;
  std::mutex mutex;
  const pid_t process = getpid();

  // The call that runs.
  const void* images = nullptr;
  bool is_pixels = false;
  int batch = 0, own = 0;
  std::atomic<int> next{0};
  float* logits = nullptr;

  Pool pool;  // last: its threads end before what they use
};

engine::engine(const void* file, size_t file_bytes, const Kernels& chosen, int threads, int max_batch_, int flags_)
    : program(file, file_bytes, !chosen.fuses, (flags_ & ENGINE_TAKE_PROGRAM) != 0), kernels(chosen), flags(flags_), max_batch(max_batch_),
      plan(program, chosen, (flags_ & ENGINE_KEEP_TENSORS) != 0), pool(threads) {
  sums_stride = size_t(plan.most_channels + GROUP - 1) / GROUP * GROUP + GROUP;
  const size_t shared_bytes = size_t(threads) * sums_stride * 8 + 4096 * 4;
  const int num_teams = max_batch >= threads ? threads : 1;
  for (int i = 0; i < num_teams; i++) {
    auto team = std::make_unique<Team>();
    team->arena = Memory(plan.arena_bytes);
    team->shared = Memory(shared_bytes);
    teams.push_back(std::move(team));
  }
  for (int i = 0; i < threads; i++) scratch.emplace_back(plan.scratch_bytes);
  times.assign(program.layers.size(), 0.0);
}

size_t engine::image_bytes(bool pixels) const {
  const Tensor& input = program.tensors[size_t(program.layers[0].output)];
  return size_t(input.height) * size_t(input.width) * 3 * (pixels ? 1 : 4);
}

void engine::run_image(Team& team, int thread, int image, int part, int parts) {
  uint8_t* shared = team.shared.get();
  const size_t threads = size_t(pool.threads());
  Call call;
  call.arena = team.arena.get();
  call.image = static_cast<const char*>(images) + size_t(image) * image_bytes(is_pixels);
  call.is_pixels = is_pixels;
  call.logits = logits + size_t(image) * size_t(program.num_classes);
  call.sums = reinterpret_cast<int32_t*>(shared);
  call.sums_stride = sums_stride;
  call.means = reinterpret_cast<float*>(shared + threads * sums_stride * 4);
  call.hidden = reinterpret_cast<float*>(shared + threads * sums_stride * 8);
  call.scratch = scratch[size_t(thread)].get();
  call.part = part;
  call.parts = parts;
  const bool keeps_times = (flags & ENGINE_KEEP_TIMES) != 0 && part == 0 && image == batch - 1;
  double before = keeps_times ? now() : 0;
  Prefetch prefetch;
  call.prefetch = &prefetch;
  for (size_t s = 0; s < plan.steps.size(); s++) {
    const Step& step = plan.steps[s];
    // While a convolution runs, the weights of all steps up to the next convolution come nearer, those of the first on top.
    const bool is_conv = step.kind == CONV || step.kind == DEPTHWISE;
    if (is_conv) {
      prefetch.count = 0;
      size_t last = s + 1;
      while (last + 1 < plan.steps.size() && plan.steps[last].kind != CONV && plan.steps[last].kind != DEPTHWISE) last++;
      for (size_t next = last; next > s && next < plan.steps.size(); next--) kernels.needs(plan.steps[next], part, parts, prefetch);
    }
    const bool writes_map = step.kind != CLASSIFIER && !(step.keeps_sums && step.kind == CONV);
    if (writes_map) fill_halo(step.out, call.arena, part, parts);
    for (int phase = step.first_phase; phase < step.phases; phase++) {
      kernels.run(step, phase, call);
      team.barrier.wait(parts);
    }
    if (keeps_times) {
      const double after = now();
      times[size_t(step.layer)] = after - before;
      before = after;
    }
  }
}

// A thread's share of a call: of the first `own` images whichever is next, by itself; the rest together.
void engine::run_part(int part) {
  FlushDenormals flushes;
  kernels.enter();
  const int threads = pool.threads();
  for (int image; (image = next.fetch_add(1)) < own;) run_image(*teams[size_t(part)], part, image, 0, 1);
  if (own && own < batch) teams[0]->barrier.wait(threads);
  for (int image = own; image < batch; image++) run_image(*teams[0], part, image, part, threads);
  kernels.leave();
}

const char* engine_levels(void) {
  static const std::string names = [] {
    std::string list;
    for (const Kernels* kernels : levels()) list += (list.empty() ? "" : " ") + std::string(kernels->name);
    return list;
  }();
  return names.c_str();
}

double engine_peak(const char* level, int what, double* seconds) {
  for (const Kernels* kernels : levels()) {
    if (!level || !seconds || !kernels->peak || what < 0 || what > 2 || std::strcmp(level, kernels->name)) continue;
    kernels->enter();
    const auto start = std::chrono::steady_clock::now();
    const int64_t done = kernels->peak(what, 1 << 18);
    *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    kernels->leave();
    return double(done);
  }
  return -1;
}

engine* engine_open(const void* file, size_t file_bytes, const char* level, int threads, int max_batch, int flags, char* error,
                    size_t error_bytes) {
  try {
    if (!file) throw Error("no program was given");
    if (threads < 1 || threads > MAX_THREADS)
      throw Error(std::to_string(threads) + " threads, expected 1 to " + std::to_string(MAX_THREADS));
    if (max_batch < 1 || max_batch > MAX_BATCH)
      throw Error("a largest batch of " + std::to_string(max_batch) + ", expected 1 to " + std::to_string(MAX_BATCH));
    const Kernels* chosen = nullptr;
    for (const Kernels* kernels : levels())
      if (level ? std::strcmp(level, kernels->name) == 0 : !chosen) chosen = kernels;
    if (!chosen)
      throw Error("this processor or this build has no kernels '" + std::string(level) + "', it has: " + engine_levels());
    if (!level && chosen == &PORTABLE)
      throw Error("this processor has neither AMX nor VNNI, which the native engine's fast kernels need; export for another "
                  "runtime, or ask for the level 'portable', which is slow");
    return new engine(file, file_bytes, *chosen, threads, max_batch, flags);
  } catch (const std::exception& caught) {
    refuse(error, error_bytes, caught.what());
    return nullptr;
  }
}

int engine_infer(engine* self, const void* images, int is_pixels, int batch, int is_alone, float* logits, char* error,
                 size_t error_bytes) {
  if (!self || !images || !logits) return refuse(error, error_bytes, "no program, images or logits were given");
  if (getpid() != self->process)
    return refuse(error, error_bytes,
                  "the program was opened in another process, whose threads a fork does not bring along; open it after forking");
  if (batch < 1 || batch > self->max_batch)
    return refuse(error, error_bytes, "a batch of " + std::to_string(batch) + " images, the program was opened for 1 to " +
                                          std::to_string(self->max_batch));
  std::lock_guard<std::mutex> lock(self->mutex);
  self->images = images;
  self->is_pixels = is_pixels != 0;
  self->batch = batch;
  self->logits = logits;
  self->next = 0;
  const int threads = self->pool.threads(), rounds = batch / threads;
  const bool has_all_teams = int(self->teams.size()) == threads;
  self->own = !is_alone ? batch : has_all_teams ? rounds * threads : 0;
  if (!is_alone && (batch == 1 || !has_all_teams)) self->run_part(0);  // the other threads are not even woken
  else self->pool.run([](void* context, int part) { static_cast<engine*>(context)->run_part(part); }, self);
  return 0;
}

int engine_read_tensor(engine* self, int tensor, void* to, size_t bytes, char* error, size_t error_bytes) {
  if (!self || !to) return refuse(error, error_bytes, "no program or no memory was given");
  if (!(self->flags & ENGINE_KEEP_TENSORS))
    return refuse(error, error_bytes, "tensors are overwritten unless the program is opened with the flag that keeps them");
  if (tensor < 0 || size_t(tensor) >= self->plan.maps.size())
    return refuse(error, error_bytes, "there is no tensor " + std::to_string(tensor));
  std::lock_guard<std::mutex> lock(self->mutex);
  const Map& map = self->plan.maps[size_t(tensor)];
  const size_t pixel = size_t(map.channels) * (map.is_bf16 ? 2 : 1);
  const size_t expected = size_t(map.height) * size_t(map.width) * pixel;
  if (bytes != expected)
    return refuse(error, error_bytes, "memory of " + std::to_string(bytes) + " bytes, the tensor has " + std::to_string(expected));
  const uint8_t* from = self->teams[0]->arena.get() + map.start;
  char* out = static_cast<char*>(to);
  for (int y = 0; y < map.height; y++)
    for (int x = 0; x < map.width; x++, out += pixel)
      memcpy(out, from + size_t(y) * map.row_bytes + size_t(x) * map.pixel_bytes, pixel);
  return 0;
}

int engine_layer_times(engine* self, double* seconds, int layers) {
  if (!self || !seconds || layers != int(self->times.size())) return 1;
  std::lock_guard<std::mutex> lock(self->mutex);
  memcpy(seconds, self->times.data(), self->times.size() * sizeof(double));
  return 0;
}

void engine_info(engine* self, int info[8]) {
  const Program& program = self->program;
  const Tensor& input = program.tensors[size_t(program.layers[0].output)];
  bool has_u8 = false, has_bf16 = false;
  for (const Tensor& tensor : program.tensors) (tensor.type == U8 ? has_u8 : has_bf16) = true;
  const int values[8] = {input.height, input.width, program.num_classes, int(program.tensors.size()),
                         int(program.layers.size()), self->pool.threads(), has_u8, has_bf16};
  memcpy(info, values, sizeof values);
}

const char* engine_level(engine* self) { return self->kernels.name; }

// In a forked child the threads are missing that a destructor would wait for: the memory is left to the child's end.
void engine_close(engine* self) {
  if (self && getpid() == self->process) delete self;
}
