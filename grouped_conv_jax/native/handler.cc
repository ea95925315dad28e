// The functions that XLA and Python call. They check everything that they are given.
#include <algorithm>
#include <exception>
#include <new>
#include <string>

#include "compute.h"
#include "instruction_sets.h"
#include "plan.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace grouped_conv {
namespace {

ffi::Error Invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("grouped_conv_jax: " + what);
}

// The sizes of the three arrays, in the roles that they have in a `Request`: `results` is the
// output's gradient if the result is the kernel's gradient.
struct Shapes {
  ffi::AnyBuffer::Dimensions operand, results, kernel;
};

// Fills in a request and returns what is wrong. `numbers` are its `Dimension`s, one after the
// other.
std::string MakeRequest(Contraction contraction, const Shapes& shapes, int64_t groups,
                        ffi::Span<const int64_t> numbers, Request* request) {
  const auto& [operand, results, kernel] = shapes;
  if (numbers.size() != 14) return "expected 14 numbers";
  if (operand.size() != 4 || results.size() != 4 || kernel.size() != 4) {
    return "arrays have four dimensions";
  }
  if (groups < 1 || operand[3] % groups || results[3] % groups) {
    return "features are not a multiple of the groups";
  }
  request->contraction = contraction;
  request->batch = operand[0];
  request->groups = groups;
  request->inputs = operand[3] / groups;
  request->outputs = results[3] / groups;
  bool is_forward = contraction != Contraction::kDgrad;
  bool fits = results[0] == request->batch &&
              kernel[2] == (is_forward ? request->inputs : request->outputs) &&
              kernel[3] == (is_forward ? results : operand)[3];
  for (int i = 0; i < 2; i++) {
    const int64_t* n = numbers.begin() + 7 * i;
    request->dimensions[i] = {n[0], n[1], n[2], n[3], n[4], n[5], n[6]};
    fits = fits && operand[1 + i] == n[0] && results[1 + i] == n[1] && kernel[i] == n[2];
  }
  return fits ? "" : "shapes do not fit each other";
}

ffi::Error CheckAndCompute(Contraction contraction, ffi::ThreadPool pool, ffi::AnyBuffer first,
                           ffi::AnyBuffer second, ffi::Result<ffi::AnyBuffer> result,
                           int64_t groups, ffi::Span<const int64_t> numbers) {
  ffi::DataType type = first.element_type();
  if (type != ffi::F32 && type != ffi::F64 && type != ffi::BF16) {
    return Invalid("unsupported type of elements");
  }
  if (second.element_type() != type || result->element_type() != type) {
    return Invalid("the arrays are of several types");
  }
  bool is_sum = contraction == Contraction::kWgrad;
  Shapes shapes{first.dimensions(), (is_sum ? second : *result).dimensions(),
                (is_sum ? *result : second).dimensions()};
  Request request{};
  request.threads = std::max<int64_t>(pool.num_threads(), 1);
  std::string wrong = MakeRequest(contraction, shapes, groups, numbers, &request);
  if (wrong.empty()) wrong = Check(request);
  if (!wrong.empty()) return Invalid(wrong);
  ElementType element = type == ffi::F32   ? ElementType::kFloat32
                        : type == ffi::F64 ? ElementType::kFloat64
                                           : ElementType::kBfloat16;
  Compute(request, element, pool, first.untyped_data(), second.untyped_data(),
          result->untyped_data(), static_cast<int64_t>(result->size_bytes()));
  return ffi::Error::Success();
}

template <Contraction contraction>
ffi::Error Call(ffi::ThreadPool pool, ffi::AnyBuffer first, ffi::AnyBuffer second,
                ffi::Result<ffi::AnyBuffer> result, int64_t groups,
                ffi::Span<const int64_t> numbers) {
  try {
    return CheckAndCompute(contraction, pool, first, second, result, groups, numbers);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "grouped_conv_jax: no memory for packed arrays");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("grouped_conv_jax: ") + error.what());
  }
}

#define BINDING                \
  ffi::Ffi::Bind()             \
      .Ctx<ffi::ThreadPool>()  \
      .Arg<ffi::AnyBuffer>()   \
      .Arg<ffi::AnyBuffer>()   \
      .Ret<ffi::AnyBuffer>()   \
      .Attr<int64_t>("groups") \
      .Attr<ffi::Span<const int64_t>>("dimensions")

}  // namespace

// Everything else in the library is hidden.
#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(grouped_conv_fprop, Call<Contraction::kFprop>, BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(grouped_conv_dgrad, Call<Contraction::kDgrad>, BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(grouped_conv_wgrad, Call<Contraction::kWgrad>, BINDING);

extern "C" const char* grouped_conv_instruction_set(int i) { return NameOfInstructionSet(i); }
extern "C" void grouped_conv_use_instruction_set(int i) { UseInstructionSet(i); }

#pragma GCC visibility pop

}  // namespace grouped_conv
