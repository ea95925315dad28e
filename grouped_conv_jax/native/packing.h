// Packs rows of an image, so that the register kernels read elements that follow each other and no
// position outside the image.
//
// A window of the rows that are read together is packed, never a whole array. It holds zeros where
// the image has ended, and leaves out positions that no result reads.
#ifndef GROUPED_CONV_PACKING_H_
#define GROUPED_CONV_PACKING_H_

#include "job.h"
#include "vectors.h"

namespace grouped_conv {
namespace INSTRUCTION_SET {

INLINE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t Larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The three classes below read the elements of a pixel that are packed together. `[i]` is element
// i, and `from(i)` is a vector of the elements from number i on.

// Single features.
template <class Policy>
struct Elements {
  const typename Policy::Stored* at;
  int64_t count;
  INLINE typename Policy::Element operator[](int64_t i) const { return Policy::Packed(at[i]); }
  INLINE Vector<typename Policy::Element> from(int64_t i) const { return Policy::Packed(at + i); }
};

// Pairs of neighboring features.
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

// Pairs of the same feature of two pixels. If they `may_be_outside`, a null pixel counts as zeros.
template <class Policy, bool may_be_outside>
struct PixelPairs {
  const typename Policy::Stored *at, *next;
  int64_t count;
  INLINE uint32_t operator[](int64_t i) const {
    uint32_t low = !may_be_outside || at ? at[i].bits : 0;
    uint32_t high = !may_be_outside || next ? next[i].bits : 0;
    return low | high << 16;
  }
  INLINE Vector<uint32_t> from(int64_t i) const {
    Vector<uint32_t> low{}, high{};
    if (!may_be_outside || at) low = Extended(at + i);
    if (!may_be_outside || next) high = Extended(next + i);
    return low | high << 16;
  }
};

// Loads up to a vector of elements, with zeros after the last one.
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

// The three classes below pack one panel of one pixel. `copies` says whether it equals the
// elements.

// A panel for kRotate: a vector of elements, with zeros after the last one.
template <class Policy>
struct PackLanes {
  static constexpr bool copies = true;
  template <class Source>
  INLINE void operator()(typename Policy::Element* to, const Source& from) const {
    Store(to, LoadElements<Policy>(from));
  }
};

// A panel for kBroadcast: any number of elements.
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

// A panel for kSpread: `terms` vectors. Lane i of vector t is element index[i] + t.
//
// With 2 groups of 3 outputs in 8 lanes and 2 inputs, index is 0 0 0 2 2 2 0 0: the panel of the
// elements a0 a1 b0 b1 is a0 a0 a0 b0 b0 b0 - -, then a1 a1 a1 b1 b1 b1 - -.
template <class Policy>
struct PackSpread {
  static constexpr bool copies = false;
  int64_t terms;
  int32_t index[kLanes<Policy>];

  // Each group of `width` lanes sees its own `inputs` elements. If `wraps`, its lanes do not all
  // begin at the first input, but at inputs 0, 1, 2, ... and from 0 again.
  PackSpread(int64_t terms, int64_t inputs, int64_t width, bool wraps) : terms(terms) {
    int64_t groups_in_vector = kLanes<Policy> / width;
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

// The positions first + i * step of one dimension for i < count. Those that are negative or not
// less than `size` are outside the image.
struct Positions {
  int64_t first, step, count, size;
};

// The indices from `begin` to `end`, without `end`.
struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Returns the i < count for which 0 <= first + i * step < size. The taps of a 3x3 kernel at the top
// left corner with padding 1 are at -1, 0 and 1, so Inside(-1, 1, 3, size) is {1, 3}.
INLINE Span Inside(int64_t first, int64_t step, int64_t count, int64_t size) {
  int64_t begin = first < 0 ? Smaller(count, CeilDiv(-first, step)) : 0;
  int64_t end = first < size ? Smaller(count, CeilDiv(size - first, step)) : 0;
  return {begin, Larger(begin, end)};
}

// The panels that are packed of each pixel: `count` panels of `features` features each, of which
// the last one may have fewer. A pixel has `all_features` in the caller's array.
struct Panels {
  int64_t first_feature, features, count, all_features;
};

// The packed row [columns, panels, panel_size] with `pixel_size` elements from column to column.
template <class Policy>
struct PackedRow {
  typename Policy::Element* at;
  int64_t panel_size, pixel_size;
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

// Packs the parts of one row; `Pack` packs a panel.
template <class Policy, class Pack>
class RowPacker {
 public:
  using Stored = typename Policy::Stored;
  using Element = typename Policy::Element;

  INLINE RowPacker(const Positions& columns, const Panels& panels, const PackedRow<Policy>& row,
                   const Pack& pack)
      : columns_(columns),
        panels_(panels),
        row_(row),
        pack_(pack),
        left_(panels.all_features - panels.first_feature),
        full_(Smaller(panels.count, left_ / panels.features)) {}

  // Packs the columns from `begin` to `end`, which are outside the image.
  INLINE void PackZeros(int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; c++) {
      memset(pixel(c), 0, panels_.count * row_.panel_size * sizeof(Element));
    }
  }

  // Packs the columns of `inside`; `from` is the first one of them in the image.
  INLINE void PackInside(const Stored* from, Span inside) const {
    const int64_t step = columns_.step * panels_.all_features;
    if constexpr (Pack::copies && Policy::pair == 1) {
      // Full panels follow each other in the image as well, and so do whole pixels perhaps.
      if (panels_.features == row_.panel_size && full_ == panels_.count) {
        const int64_t size = full_ * row_.panel_size;
        if (columns_.step == 1 && row_.pixel_size == panels_.all_features &&
            size == row_.pixel_size) {
          return CopyElements<Policy>(pixel(inside.begin), from, inside.size() * size);
        }
        for (int64_t c = inside.begin; c < inside.end; c++, from += step) {
          CopyElements<Policy>(pixel(c), from, size);
        }
        return;
      }
    }
    for (int64_t c = inside.begin; c < inside.end; c++, from += step) {
      PackPixel(pixel(c), [&](int64_t feature, int64_t count) {
        if constexpr (Policy::pair == 1) {
          return Elements<Policy>{from + feature, count};
        } else {
          return FeaturePairs<Policy>{from + feature, count / 2};
        }
      });
    }
  }

  // Packs all columns as pairs of two pixels that are `pair_step` positions apart.
  INLINE void PackPixelPairs(const Stored* line, int64_t pair_step) const {
    auto place = [&](int64_t column) {
      bool is_inside = 0 <= column && column < columns_.size;
      return is_inside ? line + column * panels_.all_features : nullptr;
    };
    for (int64_t c = 0; c < columns_.count; c++) {
      int64_t column = columns_.first + c * columns_.step;
      const auto *at = place(column), *next = place(column + pair_step);
      if (at && next) {
        PackPixel(pixel(c), [&](int64_t feature, int64_t count) {
          return PixelPairs<Policy, false>{at + feature, next + feature, count};
        });
      } else {
        PackPixel(pixel(c), [&](int64_t feature, int64_t count) {
          return PixelPairs<Policy, true>{at ? at + feature : at, next ? next + feature : next,
                                          count};
        });
      }
    }
  }

 private:
  INLINE Element* pixel(int64_t column) const { return row_.at + column * row_.pixel_size; }

  // Packs all panels of a pixel; elements(feature, count) reads the elements of one panel.
  template <class ElementsOf>
  INLINE void PackPixel(Element* to, const ElementsOf& elements) const {
    const int64_t features = panels_.features;
    for (int64_t p = 0; p < full_; p++) {
      pack_(to + p * row_.panel_size, elements(p * features, features));
    }
    if (full_ < panels_.count) {
      pack_(to + full_ * row_.panel_size, elements(full_ * features, left_ - full_ * features));
    }
  }

  const Positions& columns_;
  const Panels& panels_;
  const PackedRow<Policy>& row_;
  const Pack& pack_;
  int64_t left_, full_;  // Features from the first packed one on, and panels that are full.
};

// Packs one row of an image, or zeros if `line` is null. Pairs are pairs of pixels, `pair_step`
// positions apart, or pairs of features if `pair_step` is 0.
template <class Policy, class Pack>
void PackRow(const typename Policy::Stored* line, const Positions& columns, const Panels& panels,
             int64_t pair_step, const PackedRow<Policy>& row, const Pack& pack) {
  RowPacker<Policy, Pack> packer(columns, panels, row, pack);
  if (line == nullptr) return packer.PackZeros(0, columns.count);
  line += panels.first_feature;
  if constexpr (Policy::pair == 2) {
    if (pair_step != 0) return packer.PackPixelPairs(line, pair_step);
  }
  Span inside = Inside(columns.first, columns.step, columns.count, columns.size);
  if (inside.size() == 0) return packer.PackZeros(0, columns.count);
  packer.PackZeros(0, inside.begin);
  packer.PackZeros(inside.end, columns.count);
  packer.PackInside(line + (columns.first + inside.begin * columns.step) * panels.all_features,
                    inside);
}

}  // namespace INSTRUCTION_SET
}  // namespace grouped_conv

#endif  // GROUPED_CONV_PACKING_H_
