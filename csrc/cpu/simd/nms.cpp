// Parallel: nothing here. On chip: five numbers of each kept box are read; the division happens only where a register
// of boxes has one that overlaps. Ragged edges: missing lanes are read as zeros, a box without area, which overlaps
// nothing by more than 0. This file is compiled without contracted multiply-adds: which side of the threshold a box
// falls on is the same for every instruction set.
#include "cpu/simd/nms.h"

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {
namespace {

template <class Acc>
bool overlaps(const BoxColumns<Acc>& kept, int64_t count, const Acc* b, Acc threshold) {
  using V = Vector<Acc>;
  constexpr int lanes = lanes_of<Acc>();
  const V x1 = broadcast(b[0]), y1 = broadcast(b[1]), x2 = broadcast(b[2]), y2 = broadcast(b[3]);
  const V area = broadcast(b[4]), limit = broadcast(threshold), zero{};
  for (int64_t i = 0; i < count; i += lanes) {
    const int64_t n = count - i;
    const V w = vmin(x2, load_some(kept.x2 + i, n)) - vmax(x1, load_some(kept.x1 + i, n));
    const V h = vmin(y2, load_some(kept.y2 + i, n)) - vmax(y1, load_some(kept.y1 + i, n));
    if (!any((w > zero) & (h > zero))) continue;
    const V shared = vmax(w, zero) * vmax(h, zero);
    if (any(shared / (load_some(kept.area + i, n) + area - shared) > limit)) return true;
  }
  return false;
}

}  // namespace

const NmsTable& nms_table() {
  static constexpr NmsTable table{&overlaps<float>, &overlaps<double>};
  return table;
}

}  // namespace pymm::PYMM_ISA
