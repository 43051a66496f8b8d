// The best of a stream of similarities, as one warp keeps them for one query.
//
// A key is a similarity in an order that integers share, and the index of the row that has it; no two keys are equal.
// Those that are kept lie in memory, shared or global, from the best on. What is better than the k-th of them waits
// behind them until the room is full; then it is sorted and joins them, by a bitonic network: nothing is atomic, and
// what remains depends on the keys alone. Of equal similarities the one that came first stays, so rows have to come in
// the order of their indices.
#pragma once

#include <cstring>
#include <limits>

#include "cuda/tensor_core.h"

namespace pymm::cuda {

// Integers in the order of the similarities; NaN is the largest, -0 is 0.
template <class Acc>
using Order = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
template <class Acc>
constexpr Order<Acc> kNoOrder = std::numeric_limits<Order<Acc>>::min();  // below -inf
template <class Acc>
constexpr Order<Acc> kLargestOrder = std::numeric_limits<Order<Acc>>::max();

// Negative numbers fall where their bits rise. The same flip is its own inverse.
template <class Acc>
PYMM_DEVICE Order<Acc> flipped(Order<Acc> bits) {
  return bits < 0 ? bits ^ kLargestOrder<Acc> : bits;
}
template <class Acc>
PYMM_DEVICE Order<Acc> order_of(Acc value) {
  if (value != value) return kLargestOrder<Acc>;
  if (value == Acc(0)) return 0;
  Order<Acc> bits;
  memcpy(&bits, &value, sizeof(bits));
  return flipped<Acc>(bits);
}
template <class Acc>
PYMM_DEVICE Acc value_of(Order<Acc> order) {
  const Order<Acc> bits = flipped<Acc>(order);
  Acc value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class Acc>
struct Key {
  Order<Acc> order;
  int32_t at;
  PYMM_DEVICE bool before(const Key& other) const {
    return order > other.order || (order == other.order && at < other.at);
  }
};

// One step of a bitonic network over `size` keys, a power of two; runs of `run` fall and rise in turn.
template <class Acc>
PYMM_DEVICE void exchange(Key<Acc>* keys, int size, int run, int distance) {
  for (int pair = lane_id(); pair < size / 2; pair += kWarp) {
    const int i = 2 * pair - (pair & (distance - 1)), j = i + distance;
    const Key<Acc> low = keys[i], high = keys[j];
    if ((i & run) == 0 ? high.before(low) : low.before(high)) {
      keys[i] = high;
      keys[j] = low;
    }
  }
  PYMM_SYNC_WARP();
}

template <class Acc>
struct Best {
  Key<Acc>* keys;                    // `size` that are kept, then `size` that wait
  int size, k;                       // a power of two of at least kWarp and k
  int waiting = 0;                   // the same for all lanes, like the next
  Order<Acc> worst = kNoOrder<Acc>;  // of the k-th that is kept

  PYMM_DEVICE void clear() {
    for (int i = lane_id(); i < size; i += kWarp) keys[i] = {kNoOrder<Acc>, 0};
    PYMM_SYNC_WARP();
  }

  // One key from each lane, indices rising with the lane; whether any was good enough.
  PYMM_DEVICE bool offer(Order<Acc> order, int32_t at) {
    for (;;) {
      const bool passes = order > worst;
      const uint32_t passing = ballot(passes);
      const int count = count_bits(passing);
      if (waiting + count <= size) {
        const uint32_t before = passing & ((1u << lane_id()) - 1);
        if (passes) keys[size + waiting + count_bits(before)] = {order, at};
        waiting += count;
        return count > 0;
      }
      join();
    }
  }

  PYMM_DEVICE void join() {
    if (waiting == 0) return;
    const int lane = lane_id();
    for (int i = waiting + lane; i < size; i += kWarp) keys[size + i] = {kNoOrder<Acc>, 0};
    PYMM_SYNC_WARP();
    for (int run = 2; run <= size; run *= 2) {
      for (int distance = run / 2; distance > 0; distance /= 2) exchange(keys + size, size, run, distance);
    }
    // The best of the worst kept against the best waiting, and so on, are the best of all, first falling then rising.
    for (int i = lane; i < size; i += kWarp) {
      const Key<Acc> waited = keys[size + i];
      if (waited.before(keys[size - 1 - i])) keys[size - 1 - i] = waited;
    }
    PYMM_SYNC_WARP();
    for (int distance = size / 2; distance > 0; distance /= 2) exchange(keys, size, size, distance);
    worst = keys[k - 1].order;
    waiting = 0;
  }
};

}  // namespace pymm::cuda
