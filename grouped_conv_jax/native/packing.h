// Packed copies of a tile and of the kernel, in which the inner loops read one element after the
// other and no position is outside.
//
// Of the operand only a window is packed, some rows that are read together: zeros where the image
// has ended, positions that are not read left out. No array is ever padded as a whole.
#ifndef GROUPED_CONV_PACKING_H_
#define GROUPED_CONV_PACKING_H_

#include "job.h"
#include "vectors.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

INLINE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t Larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t Blocks(int64_t size, int64_t largest) { return (size + largest - 1) / largest; }

// The elements of a pixel, by their number; or as many as a vector has, from one of them on.
template <class Policy>
struct Elements {
  const typename Policy::Stored* at;
  int64_t count;
  INLINE typename Policy::Element operator[](int64_t i) const { return Policy::Packed(at[i]); }
  INLINE Vector<typename Policy::Element> from(int64_t i) const { return Policy::Packed(at + i); }
};

// Pairs of neighbouring features, to be multiplied and added up together.
template <class Policy>
struct FeaturePairs {
  const typename Policy::Stored* at;
  int64_t count;
  INLINE uint32_t operator[](int64_t i) const {
    uint32_t pair;
    memcpy(&pair, at + 2 * i, sizeof(pair));
    return pair;
  }
  INLINE Vector<uint32_t> from(int64_t i) const { return Load<Vector<uint32_t>>(at + 2 * i); }
};

// Pairs of the same feature of two pixels, either of which may be outside if they `may_be`.
template <class Policy, bool may_be>
struct PixelPairs {
  const typename Policy::Stored *at, *next;
  int64_t count;
  INLINE uint32_t operator[](int64_t i) const {
    uint32_t low = !may_be || at ? at[i].bits : 0, high = !may_be || next ? next[i].bits : 0;
    return low | high << 16;
  }
  INLINE Vector<uint32_t> from(int64_t i) const {
    Vector<uint32_t> low{}, high{};
    if (!may_be || at) low = Extended(at + i);
    if (!may_be || next) high = Extended(next + i);
    return low | high << 16;
  }
};

// Up to a vector of them, zeros after the last.
template <class Policy, class Source>
INLINE Vector<typename Policy::Element> LoadElements(const Source& from) {
  constexpr int lanes = kLanes<Policy>;
  if (from.count == lanes) return from.from(0);
  typename Policy::Element all[lanes] = {};
  if (from.count == lanes / 2) {
    for (int i = 0; i < lanes / 2; i++) all[i] = from[i];
  } else {
    for (int64_t i = 0; i < from.count; i++) all[i] = from[i];
  }
  return Load<Vector<typename Policy::Element>>(all);
}

// Each of these packs one source of one pixel.

// A vector of neighbouring elements, zeros after the last.
template <class Policy>
struct PackLanes {
  static constexpr bool copies = true;
  template <class Source>
  INLINE void operator()(typename Policy::Element* to, const Source& from) const {
    Store(to, LoadElements<Policy>(from));
  }
};

// Elements one after the other.
template <class Policy>
struct PackScalars {
  static constexpr bool copies = true;
  template <class Source>
  INLINE void operator()(typename Policy::Element* to, const Source& from) const {
    constexpr int lanes = kLanes<Policy>;
    int64_t i = 0;
    for (; i + lanes <= from.count; i += lanes) Store(to + i, from.from(i));
    for (; i < from.count; i++) to[i] = from[i];
  }
};

// `terms` vectors; lane i of the first is element index[i], of the second the one after that.
template <class Policy>
struct PackSpread {
  static constexpr bool copies = false;
  int64_t terms, inputs, groups_in_vector;
  int32_t index[kLanes<Policy>];

  // Each group of `width` lanes sees the `inputs` elements of its own, from any of them on if
  // `wraps`.
  PackSpread(int64_t terms, int64_t inputs, int64_t width, bool wraps)
      : terms(terms), inputs(inputs), groups_in_vector(kLanes<Policy> / width) {
    for (int64_t i = 0; i < kLanes<Policy>; i++) {
      int64_t group = i / width < groups_in_vector ? i / width : 0;
      index[i] = static_cast<int32_t>(group * inputs + (wraps ? i % width % inputs : 0));
    }
  }

  template <class Source>
  INLINE void operator()(typename Policy::Element* to, const Source& from) const {
    using Element = typename Policy::Element;
    constexpr int lanes = kLanes<Policy>;
#if defined(__GNUC__) && !defined(__clang__)
    if (from.count <= lanes) {
      using Index = Vector<std::conditional_t<sizeof(Element) == 8, int64_t, int32_t>>;
      Vector<Element> elements = LoadElements<Policy>(from);
      Index lane;
      for (int i = 0; i < lanes; i++) lane[i] = index[i];
      for (int64_t t = 0; t < terms; t++) {
        Store(to + t * lanes, __builtin_shuffle(elements, lane + static_cast<int32_t>(t)));
      }
      return;
    }
#endif
    for (int64_t t = 0; t < terms; t++) {
      for (int i = 0; i < lanes; i++) {
        to[t * lanes + i] = index[i] + t < from.count ? from[index[i] + t] : Element{};
      }
    }
  }
};

// Which positions of one dimension are packed: first + i * step for i < count, zeros where that is
// negative or not less than `size`.
struct Positions {
  int64_t first, step, count, size;
};

// From `begin` to `end`, not included.
struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Those of `count` indices for which first + i * step is inside.
INLINE Span Inside(int64_t first, int64_t step, int64_t count, int64_t size) {
  int64_t begin = first < 0 ? Smaller(count, Blocks(-first, step)) : 0;
  int64_t end = first < size ? Smaller(count, Blocks(size - first, step)) : 0;
  return {begin, Larger(begin, end)};
}

// `count` of them, `features` apart from each other; the last one may have fewer elements.
struct Sources {
  int64_t first_feature, features, count;
  int64_t all_features;  // Of a pixel.
};

template <class Policy>
INLINE void CopyElements(typename Policy::Element* to, const typename Policy::Stored* from,
                         int64_t count) {
  if constexpr (std::is_same_v<typename Policy::Stored, typename Policy::Element>) {
    // The C library copies faster than a loop of vectors.
    memcpy(to, from, count * sizeof(*to));
  } else {
    PackScalars<Policy>()(to, Elements<Policy>{from, count});
  }
}

// Packs one row of an image, null if there is none, as [columns, sources, unit], with `pixel`
// elements from column to column. `pair_step` is how far the other pixel of a pair is, in
// positions; 0 for pairs of features, or none.
template <class Policy, class Pack>
void PackRow(const typename Policy::Stored* line, const Positions& columns, const Sources& sources,
             int64_t pair_step, typename Policy::Element* to, int64_t unit, int64_t pixel,
             const Pack& pack) {
  using Element = typename Policy::Element;
  auto zero = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c++) {
      memset(to + c * pixel, 0, sources.count * unit * sizeof(Element));
    }
  };
  if (line == nullptr) return zero(0, columns.count);
  line += sources.first_feature;
  int64_t left = sources.all_features - sources.first_feature;
  int64_t full = Smaller(sources.count, left / sources.features);
  // All sources of a pixel; `elements` makes what is packed of a place in it.
  auto each = [&](Element* to, const auto& elements) INLINE_LAMBDA {
    for (int64_t s = 0; s < full; s++) {
      pack(to + s * unit, elements(s * sources.features, sources.features));
    }
    if (full < sources.count) {
      pack(to + full * unit, elements(full * sources.features, left - full * sources.features));
    }
  };
  if constexpr (Policy::pair == 2) {
    if (pair_step != 0) {
      auto place = [&](int64_t column) {
        bool is_inside = 0 <= column && column < columns.size;
        return is_inside ? line + column * sources.all_features : nullptr;
      };
      for (int64_t c = 0; c < columns.count; c++) {
        int64_t column = columns.first + c * columns.step;
        const auto *at = place(column), *next = place(column + pair_step);
        if (at && next) {
          each(to + c * pixel, [&](int64_t feature, int64_t count) {
            return PixelPairs<Policy, false>{at + feature, next + feature, count};
          });
        } else {
          each(to + c * pixel, [&](int64_t feature, int64_t count) {
            return PixelPairs<Policy, true>{at ? at + feature : at, next ? next + feature : next,
                                            count};
          });
        }
      }
      return;
    }
  }
  Span inside = Inside(columns.first, columns.step, columns.count, columns.size);
  if (inside.size() == 0) return zero(0, columns.count);
  zero(0, inside.begin);
  zero(inside.end, columns.count);
  const auto* from = line + (columns.first + inside.begin * columns.step) * sources.all_features;
  if constexpr (Pack::copies && Policy::pair == 1) {
    if (sources.features == unit && full == sources.count) {  // Without gaps.
      if (columns.step == 1 && pixel == sources.all_features && full * unit == pixel) {
        CopyElements<Policy>(to + inside.begin * pixel, from, inside.size() * pixel);
        return;
      }
      for (int64_t c = inside.begin; c < inside.end; c++) {
        CopyElements<Policy>(to + c * pixel, from, full * unit);
        from += columns.step * sources.all_features;
      }
      return;
    }
  }
  for (int64_t c = inside.begin; c < inside.end; c++) {
    each(to + c * pixel, [&](int64_t feature, int64_t count) {
      if constexpr (Policy::pair == 1) {
        return Elements<Policy>{from + feature, count};
      } else {
        return FeaturePairs<Policy>{from + feature, count / 2};
      }
    });
    from += columns.step * sources.all_features;
  }
}

// Calls visit(at, element) for each weight of a vector: its place in the packed vector, and in the
// kernel of the caller.
//
// What the lanes are differs: sums over inputs have outputs in their lanes, and the inputs turn;
// the kernel's gradient turns the outputs (`outputs_turn`), which it reads once for all taps.
template <class Visit>
INLINE void EachWeight(const Job& job, int64_t vector, int64_t pair, bool outputs_turn,
                       const Visit& visit) {
  // Of each lane for the first term, and for the others of kRotate.
  constexpr int64_t most_lanes = 16, most_turns = 8;
  int64_t places[most_turns][most_lanes];
  int64_t lanes = job.valid_lanes(vector);
  bool turns = job.mode == Mode::kRotate;
  int64_t step = job.input_stride * pair;  // From term to term.
  for (int64_t l = 0; l < lanes; l++) {
    int64_t group = vector / job.vectors_in_group, output;
    if (job.mode == Mode::kBroadcast) {
      output = vector % job.vectors_in_group * job.lanes + l;
    } else {
      group = vector * job.groups_in_vector + l / job.outputs;
      output = l % job.outputs;
    }
    for (int64_t t = 0; t < (turns ? job.terms : 1); t++) {
      int64_t input = !turns ? 0 : outputs_turn ? output : (output + t) % job.terms;
      int64_t to = turns && outputs_turn ? (output + t) % job.outputs : output;
      places[t][l] = input * step + group * job.group_stride + to * job.output_stride;
    }
  }
  int64_t at = 0;
  auto each_part = [&](int64_t at, int64_t place) INLINE_LAMBDA {
    for (int64_t k = 0; k < pair; k++) visit(at * pair + k, place + k * job.input_stride);
  };
  for (int64_t a = 0; a < job.axes[0].phase_count; a++) {
    for (int64_t b = 0; b < job.axes[1].phase_count; b++) {
      const Phase &p = job.axes[0].phases[a], &q = job.axes[1].phases[b];
      for (int64_t i = 0; i < p.taps; i++) {
        for (int64_t j = 0; j < q.taps; j++, at += job.terms * job.lanes) {
          int64_t tap = (p.tap + i * p.tap_step) * job.tap_strides[0] +
                        (q.tap + j * q.tap_step) * job.tap_strides[1];
          if (!turns && job.input_stride == 1) {  // Neighbours one after the other.
            for (int64_t l = 0; l < lanes; l++) {
              for (int64_t t = 0; t < job.terms; t++) {
                each_part(at + t * job.lanes + l, tap + places[0][l] + t * step);
              }
            }
          } else {
            for (int64_t t = 0; t < job.terms; t++) {
              const int64_t* row = places[turns ? t : 0];
              int64_t term = turns ? tap : tap + t * step;
              for (int64_t l = 0; l < lanes; l++) {
                each_part(at + t * job.lanes + l, term + row[l]);
              }
            }
          }
        }
      }
    }
  }
}

template <class Policy>
void PackWeights(const Job& job, int64_t vector) {
  using Element = typename Policy::Element;
  // Of pairs the halves, which are as they are stored.
  using Part = std::conditional_t<Policy::pair == 1, Element, typename Policy::Stored>;
  const auto* from = static_cast<const typename Policy::Stored*>(job.other);
  Element* packed = static_cast<Element*>(job.packed) + vector * job.vector_size();
  if (job.valid_lanes(vector) < job.lanes) {
    memset(packed, 0, job.vector_size() * sizeof(Element));
  }
  Part* to = reinterpret_cast<Part*>(packed);
  EachWeight(job, vector, Policy::pair, false, [&](int64_t at, int64_t place) INLINE_LAMBDA {
    if constexpr (Policy::pair == 1) {
      to[at] = Policy::Packed(from[place]);
    } else {
      to[at] = from[place];
    }
  });
}

// The sums of all slices, always in the same order, to where the caller wants them.
template <class Policy>
void UnpackWeights(const Job& job, int64_t vector) {
  using Number = std::remove_reference_t<decltype(typename Policy::Sum{}[0])>;
  auto* to = static_cast<typename Policy::Stored*>(job.result);
  int64_t slice = job.vectors * job.vector_size();
  Number* sums = static_cast<Number*>(job.packed) + vector * job.vector_size();
  for (int64_t s = 1; s < job.slices; s++) {
    for (int64_t i = 0; i < job.vector_size(); i++) sums[i] += sums[s * slice + i];
  }
  EachWeight(job, vector, 1, true, [&](int64_t at, int64_t place) INLINE_LAMBDA {
    to[place] = Policy::Rounded(sums[at]);
  });
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_PACKING_H_
