// A C function that calls the kernels without XLA, for the fuzzer. Each call has its own threads.
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#include "compute.h"

namespace {

class Threads {
 public:
  template <class Function>
  void Schedule(Function function) {
    threads_.emplace_back(function);
  }
  ~Threads() {
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::vector<std::thread> threads_;
};

}  // namespace

#pragma GCC visibility push(default)

extern "C" {

// `sizes` are batch, groups, inputs and outputs; `numbers` are the 14 numbers that the handler
// gets. Returns 0, or 1 if the request is refused, or 2 if there is no memory.
int direct(int contraction, int type, int threads, const int64_t* sizes, const int64_t* numbers,
           const void* first, const void* second, void* result, int64_t result_bytes) {
  grouped_conv::Request request{};
  request.contraction = static_cast<grouped_conv::Contraction>(contraction);
  request.batch = sizes[0];
  request.groups = sizes[1];
  request.inputs = sizes[2];
  request.outputs = sizes[3];
  request.threads = threads;
  for (int i = 0; i < 2; i++, numbers += 7) {
    request.dimensions[i] = {numbers[0], numbers[1], numbers[2], numbers[3],
                             numbers[4], numbers[5], numbers[6]};
  }
  if (!grouped_conv::Check(request).empty()) return 1;
  Threads pool;
  try {
    grouped_conv::Compute(request, static_cast<grouped_conv::ElementType>(type), pool, first,
                          second, result, result_bytes);
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}

const char* instruction_set(int i) { return grouped_conv::NameOfInstructionSet(i); }
void use_instruction_set(int i) { grouped_conv::UseInstructionSet(i); }

}  // extern "C"
