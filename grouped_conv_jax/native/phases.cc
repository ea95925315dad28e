// The arithmetic of strides and dilations (see phases.h).
#include "phases.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

namespace grouped_conv {
namespace {

// Returns the phases of the results along a dimension, in positions of the operand.
//
// Result q reads an element through tap i if q * stride + i * dilation - low is a multiple of gaps.
// So results `period` apart see the same taps, and the taps that a result sees are `tap_step`
// apart. The first one is below `tap_step`, or there is none. `Phase` has an example.
std::vector<Phase> PhasesOf(const Dimension& d) {
  int64_t period = d.gaps / std::gcd(d.stride, d.gaps);
  int64_t tap_step = d.gaps / std::gcd(std::abs(d.dilation), d.gaps);
  std::vector<Phase> phases;
  for (int64_t residue = 0; residue < std::min(period, d.results); residue++) {
    Phase phase{};
    phase.residue = residue;
    phase.period = period;
    phase.count = CeilDiv(d.results - residue, period);
    phase.step = period * d.stride / d.gaps;
    phase.gap = 1;
    auto start = [&](int64_t tap) { return residue * d.stride + tap * d.dilation - d.low; };
    int64_t tap = 0, end = std::min(tap_step, d.taps);
    while (tap < end && start(tap) % d.gaps != 0) tap++;
    if (tap < end) {
      phase.tap = tap;
      phase.taps = (d.taps - 1 - tap) / tap_step + 1;
      phase.tap_step = tap_step;
      phase.first = start(tap) / d.gaps;
      phase.gap = tap_step * d.dilation / d.gaps;
      if (phase.gap < 0) {
        // The input's gradient reads the kernel backwards, so its first tap is the last one.
        phase.tap += (phase.taps - 1) * tap_step;
        phase.first += (phase.taps - 1) * phase.gap;
        phase.tap_step = -tap_step;
        phase.gap = -phase.gap;
      }
    }
    phases.push_back(phase);
  }
  return phases;
}

}  // namespace

Axis AxisOf(const Dimension& dimension, std::vector<Phase>* phases) {
  *phases = PhasesOf(dimension);
  Axis axis{};
  axis.operand = dimension.operand;
  axis.results = dimension.results;
  axis.phases = phases->data();
  axis.phase_count = static_cast<int64_t>(phases->size());
  bool reads = false;
  for (const Phase& phase : *phases) {
    if (phase.taps == 0) continue;
    axis.low = reads ? std::min(axis.low, phase.first) : phase.first;
    reads = true;
  }
  axis.grain = (*phases)[0].step;
  for (const Phase& phase : *phases) {
    if (phase.taps == 0) continue;
    axis.grain = std::gcd(axis.grain, phase.first - axis.low);
    if (phase.taps > 1) axis.grain = std::gcd(axis.grain, phase.gap);
  }
  axis.step = (*phases)[0].step / axis.grain;
  axis.span = 1;
  for (Phase& phase : *phases) {
    phase.step = axis.step;
    phase.first = phase.taps > 0 ? (phase.first - axis.low) / axis.grain : 0;
    phase.gap = phase.taps > 1 ? phase.gap / axis.grain : 1;
    if (phase.taps > 0) {
      axis.span = std::max(axis.span, phase.first + (phase.taps - 1) * phase.gap + 1);
    }
  }
  return axis;
}

}  // namespace grouped_conv
