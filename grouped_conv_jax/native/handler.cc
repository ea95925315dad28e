// The call from XLA: whatever it hands over is checked before anything is computed.
#include <algorithm>
#include <exception>
#include <new>
#include <string>

#include "compute.h"
#include "engines.h"
#include "plan.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace grouped_conv {
namespace {

ffi::Error Invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("grouped_conv_jax: " + what);
}

struct Shape {
  int64_t sizes[4];
};

bool ShapeOf(const ffi::AnyBuffer& buffer, Shape* shape) {
  auto dimensions = buffer.dimensions();
  if (dimensions.size() != 4) return false;
  for (int i = 0; i < 4; i++) shape->sizes[i] = dimensions[i];
  return true;
}

// `numbers` are the two `Dimension`s one after the other.
ffi::Error CheckAndCompute(Contraction contraction, ffi::ThreadPool pool, ffi::AnyBuffer first,
                           ffi::AnyBuffer second, ffi::Result<ffi::AnyBuffer> result,
                           int64_t groups, ffi::Span<const int64_t> numbers) {
  if (numbers.size() != 14) return Invalid("expected 14 numbers");
  Type type;
  switch (first.element_type()) {
    case ffi::DataType::F32:
      type = Type::kFloat32;
      break;
    case ffi::DataType::F64:
      type = Type::kFloat64;
      break;
    case ffi::DataType::BF16:
      type = Type::kBfloat16;
      break;
    default:
      return Invalid("unsupported type of elements");
  }
  if (second.element_type() != first.element_type() ||
      result->element_type() != first.element_type()) {
    return Invalid("the arrays are of several types");
  }
  bool is_sum = contraction == Contraction::kWgrad;
  Shape operand, other, kernel;
  if (!ShapeOf(first, &operand) || !ShapeOf(is_sum ? second : *result, &other) ||
      !ShapeOf(is_sum ? *result : second, &kernel)) {
    return Invalid("arrays have four dimensions");
  }
  Request request{};
  request.contraction = contraction;
  request.batch = operand.sizes[0];
  request.groups = groups;
  if (groups < 1 || operand.sizes[3] % groups || other.sizes[3] % groups) {
    return Invalid("features are not a multiple of the groups");
  }
  request.inputs = operand.sizes[3] / groups;
  request.outputs = other.sizes[3] / groups;
  request.threads = std::max<int64_t>(pool.num_threads(), 1);
  bool is_forward = contraction != Contraction::kDgrad;
  bool matches = other.sizes[0] == request.batch &&
                 kernel.sizes[2] == (is_forward ? request.inputs : request.outputs) &&
                 kernel.sizes[3] == (is_forward ? other : operand).sizes[3];
  for (int i = 0; i < 2; i++) {
    const int64_t* n = numbers.begin() + 7 * i;
    request.dimensions[i] = {n[0], n[1], n[2], n[3], n[4], n[5], n[6]};
    matches = matches && operand.sizes[1 + i] == n[0] && other.sizes[1 + i] == n[1] &&
              kernel.sizes[i] == n[2];
  }
  if (!matches) return Invalid("shapes do not fit each other");
  if (std::string wrong = Check(request); !wrong.empty()) return Invalid(wrong);

  Compute(request, type, pool, first.untyped_data(), second.untyped_data(), result->untyped_data(),
          static_cast<int64_t>(result->size_bytes()));
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

// What Python sees.
#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(grouped_conv_fprop, Call<Contraction::kFprop>, BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(grouped_conv_dgrad, Call<Contraction::kDgrad>, BINDING);
XLA_FFI_DEFINE_HANDLER_SYMBOL(grouped_conv_wgrad, Call<Contraction::kWgrad>, BINDING);

extern "C" const char* grouped_conv_instruction_set(int i) { return NameOfInstructionSet(i); }
extern "C" void grouped_conv_use_instruction_set(int i) { UseInstructionSet(i); }

#pragma GCC visibility pop

}  // namespace grouped_conv
