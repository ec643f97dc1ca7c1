// Waiting is a short spin (a barrier between two steps is passed within a microsecond when both threads run), then a futex: threads
// that spun on lost whole time slices, 4 to 8 ms a call, when a third program wanted the core.
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace native {
namespace {

constexpr int SPINS_IN_CALL = 2000;   // about 30 us
constexpr int SPINS_BETWEEN_CALLS = 2000;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns when `word` is no longer `old`.
void wait_while(std::atomic<uint32_t>& word, uint32_t old, int spins, std::atomic<int>& sleepers) {
  for (int i = 0; i < spins; i++) {
    if (word.load(std::memory_order_acquire) != old) return;
    relax();
  }
  sleepers.fetch_add(1);
  while (word.load() == old) syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  sleepers.fetch_sub(1);
}

void wake_all(std::atomic<uint32_t>& word, std::atomic<int>& sleepers) {
  if (sleepers.load() > 0) syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

void Barrier::wait(int parts) {
  if (parts == 1) return;
  const uint32_t round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == parts - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1);
    wake_all(round_, sleepers_);
  } else {
    wait_while(round_, round, SPINS_IN_CALL, sleepers_);
  }
}

Pool::Pool(int threads) : parts_(threads) {
  try {
    for (int part = 1; part < threads; part++) threads_.emplace_back([this, part] { serve(part); });
  } catch (...) {
    ends_ = true;
    call_.fetch_add(1);
    wake_all(call_, sleepers_);
    for (auto& thread : threads_) thread.join();
    throw;
  }
}

Pool::~Pool() {
  ends_ = true;
  call_.fetch_add(1);
  wake_all(call_, sleepers_);
  for (auto& thread : threads_) thread.join();
}

// Linux wakes a thread on the core of whoever wakes it, rather than on one that sleeps, and leaves it there: two threads on one
// core took 3.7 ms for lite0 where it is called every few milliseconds, on two 1.6.
void Pool::spread() {
  const int core = sched_getcpu();
  if (core == core_ || threads_.empty()) return;
  core_ = core;
  cpu_set_t others;
  if (core < 0 || core >= CPU_SETSIZE || sched_getaffinity(0, sizeof others, &others) != 0) return;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) == 0) return;
  for (auto& thread : threads_) pthread_setaffinity_np(thread.native_handle(), sizeof others, &others);
}

void Pool::run(void (*work)(void*, int), void* context) {
  work_ = work;
  context_ = context;
  spread();
  call_.fetch_add(1);
  wake_all(call_, sleepers_);
  work(context, 0);
  done_.wait(parts_);
}

void Pool::serve(int part) {
  for (uint32_t seen = 0;; seen++) {
    wait_while(call_, seen, SPINS_BETWEEN_CALLS, sleepers_);
    if (ends_) return;
    work_(context_, part);
    done_.wait(parts_);
  }
}

}  // namespace native
