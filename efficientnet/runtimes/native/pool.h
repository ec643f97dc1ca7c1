// Threads that run the parts of a call. One pool for each opened program: the caller is part 0, the others wait a little while
// for the next call and then sleep, so that another program gets the core. They are woken on other cores than the caller's.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace native {

// Where the threads of a team meet between two steps.
class Barrier {
 public:
  void wait(int parts);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  std::atomic<int> sleepers_{0};
};

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();

  // Runs work(context, part) for each part, and returns when all have.
  void run(void (*work)(void*, int), void* context);
  int threads() const { return parts_; }

 private:
  void serve(int part);
  void spread();

  const int parts_;
  std::vector<std::thread> threads_;
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::atomic<uint32_t> call_{0};
  std::atomic<bool> ends_{false};
  std::atomic<int> sleepers_{0};
  int core_ = -1;  // the caller's, which the threads are kept from
  Barrier done_;
};

}  // namespace native
