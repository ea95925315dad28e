// Packs the kernel of the convolution for the register kernels, and unpacks its gradient.
//
// The packed kernel is [vectors, taps, terms, lanes]. The taps of all phases follow each other.
#ifndef GROUPED_CONV_PACKED_KERNEL_H_
#define GROUPED_CONV_PACKED_KERNEL_H_

#include "job.h"
#include "vectors.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

// A phase of rows together with a phase of columns. The weights of its taps begin at `offset` in
// the packed weights of a vector.
struct Phase2d {
  const Phase &rows, &columns;
  int64_t offset;
};

// Calls visit(phase) for each phase in the order of the packed kernel.
template <class Visit>
INLINE void EachPhase(const Job& job, const Visit& visit) {
  int64_t offset = 0;
  for (int64_t a = 0; a < job.axes[0].phase_count; a++) {
    for (int64_t b = 0; b < job.axes[1].phase_count; b++) {
      Phase2d phase{job.axes[0].phases[a], job.axes[1].phases[b], offset};
      visit(phase);
      offset += phase.rows.taps * phase.columns.taps * job.terms * job.lanes;
    }
  }
}

constexpr int64_t kMostLanes = 16, kMostRotations = 8;

// Finds the weights of tap 0 for each lane of a vector: its place in the caller's kernel is
// places[t][lane] for term t of kRotate, and places[0][lane] for the first term otherwise.
//
// With groups of 4 in kRotate, lane l of term t has output l and input (l + t) % 4, because the
// inputs are rotated by t. If the `outputs_rotate`, as in the kernel's gradient, lane l has input l
// and output (l + t) % 4.
INLINE void FindPlaces(const Job& job, int64_t vector, int64_t step, bool outputs_rotate,
                       int64_t (&places)[kMostRotations][kMostLanes]) {
  bool rotates = job.layout == Layout::kRotate;
  for (int64_t l = 0; l < job.valid_lanes(vector); l++) {
    int64_t group = vector / job.vectors_in_group, output;
    if (job.layout == Layout::kBroadcast) {
      output = vector % job.vectors_in_group * job.lanes + l;
    } else {
      group = vector * job.groups_in_vector + l / job.outputs;
      output = l % job.outputs;
    }
    for (int64_t t = 0; t < (rotates ? job.terms : 1); t++) {
      int64_t input = !rotates ? 0 : outputs_rotate ? output : (output + t) % job.terms;
      int64_t to = rotates && outputs_rotate ? (output + t) % job.outputs : output;
      places[t][l] = input * step + group * job.group_stride + to * job.output_stride;
    }
  }
}

// Calls visit(packed, place) for each weight of a vector: the index in the packed vector, and the
// index in the caller's kernel. A packed pair has two indices, 2n and 2n + 1.
template <class Visit>
INLINE void EachWeight(const Job& job, int64_t vector, int64_t pair, bool outputs_rotate,
                       const Visit& visit) {
  int64_t places[kMostRotations][kMostLanes];
  int64_t lanes = job.valid_lanes(vector);
  int64_t step = job.input_stride * pair;  // From term to term, if no inputs are rotated.
  FindPlaces(job, vector, step, outputs_rotate, places);
  bool rotates = job.layout == Layout::kRotate;
  auto visit_pair = [&](int64_t packed, int64_t place) INLINE_LAMBDA {
    for (int64_t k = 0; k < pair; k++) visit(packed * pair + k, place + k * job.input_stride);
  };
  auto visit_tap = [&](int64_t packed, int64_t tap) INLINE_LAMBDA {
    if (!rotates && job.input_stride == 1) {  // The inner loop reads neighboring weights.
      for (int64_t l = 0; l < lanes; l++) {
        for (int64_t t = 0; t < job.terms; t++) {
          visit_pair(packed + t * job.lanes + l, tap + places[0][l] + t * step);
        }
      }
    } else {
      for (int64_t t = 0; t < job.terms; t++) {
        const int64_t* row = places[rotates ? t : 0];
        int64_t term = rotates ? tap : tap + t * step;
        for (int64_t l = 0; l < lanes; l++) visit_pair(packed + t * job.lanes + l, term + row[l]);
      }
    }
  };
  EachPhase(job, [&](const Phase2d& phase) INLINE_LAMBDA {
    const Phase &p = phase.rows, &q = phase.columns;
    int64_t packed = phase.offset;
    for (int64_t i = 0; i < p.taps; i++) {
      for (int64_t j = 0; j < q.taps; j++, packed += job.terms * job.lanes) {
        visit_tap(packed, (p.tap + i * p.tap_step) * job.tap_strides[0] +
                              (q.tap + j * q.tap_step) * job.tap_strides[1]);
      }
    }
  });
}

template <class Policy>
void PackWeights(const Job& job, int64_t vector) {
  using Element = typename Policy::Element;
  using Half = std::conditional_t<Policy::pair == 1, Element, typename Policy::Stored>;
  const auto* from = static_cast<const typename Policy::Stored*>(job.other);
  Element* packed = static_cast<Element*>(job.packed) + vector * job.vector_size();
  if (job.valid_lanes(vector) < job.lanes) {
    memset(packed, 0, job.vector_size() * sizeof(Element));
  }
  Half* to = reinterpret_cast<Half*>(packed);
  EachWeight(job, vector, Policy::pair, false, [&](int64_t at, int64_t place) INLINE_LAMBDA {
    if constexpr (Policy::pair == 1) {
      to[at] = Policy::Packed(from[place]);
    } else {
      to[at] = from[place];
    }
  });
}

// Adds the sums of all slices, always in the same order, and stores them in the caller's array.
template <class Policy>
void UnpackWeights(const Job& job, int64_t vector) {
  auto* to = static_cast<typename Policy::Stored*>(job.result);
  int64_t slice = job.vectors * job.vector_size();
  auto* sums = static_cast<Number<Policy>*>(job.packed) + vector * job.vector_size();
  for (int64_t s = 1; s < job.slices; s++) {
    for (int64_t i = 0; i < job.vector_size(); i++) sums[i] += sums[s * slice + i];
  }
  EachWeight(job, vector, 1, true, [&](int64_t at, int64_t place) INLINE_LAMBDA {
    to[place] = Policy::Rounded(sums[at]);
  });
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_PACKED_KERNEL_H_
