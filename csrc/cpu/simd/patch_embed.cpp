#include "cpu/simd/patch_embed.h"

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {
namespace {

// Copies n >= 1 elements in pieces of at most 64 bytes, the last of which overlaps the one before.
template <class T>
inline void copy_run(const T* source, T* target, int64_t n) {
  const auto* from = reinterpret_cast<const char*>(source);
  auto* to = reinterpret_cast<char*>(target);
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  const auto pieces = [&]<int size>() {
    for (int64_t i = 0; i + size < bytes; i += size) memcpy(to + i, from + i, size);
    memcpy(to + bytes - size, from + bytes - size, size);
  };
  if (bytes >= 64) {
    pieces.template operator()<64>();
  } else if (bytes >= 32) {
    pieces.template operator()<32>();
  } else if (bytes >= 16) {
    pieces.template operator()<16>();
  } else if (bytes >= 8) {
    pieces.template operator()<8>();
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = source[i];
  }
}

template <class Acc, class From>
inline Acc number(From x) {
  if constexpr (__is_same(From, uint8_t)) {
    return x;
  } else {
    return to_acc(x);
  }
}
template <class Acc, class From>
inline Vector<Acc> numbers(const From* p, int64_t count) {
  if constexpr (__is_same(From, uint8_t)) {
    constexpr int lanes = lanes_of<Acc>();
    alignas(64) Acc values[lanes] = {};
    if (count >= lanes) {
      for (int i = 0; i < lanes; ++i) values[i] = p[i];
    } else {
      for (int64_t i = 0; i < count; ++i) values[i] = p[i];
    }
    return load(values);
  } else {
    return load_some(p, count);
  }
}

// Calls f(channel, offset of the first pixel, index in the row, length) for every line of the patch that
// [first, first + count) touches.
template <class F>
inline void each_line(const PatchLayout& patch, int64_t first, int64_t count, F&& f) {
  const int64_t line = first / patch.width;
  int64_t column = first % patch.width, channel = line / patch.height, y = line % patch.height;
  for (int64_t done = 0; done < count;) {
    const int64_t length = min_of(patch.width - column, count - done);
    f(channel, channel * patch.channel_stride + y * patch.line_stride + column * patch.column_stride, done, length);
    done += length;
    column = 0;
    if (++y == patch.height) {
      y = 0;
      ++channel;
    }
  }
}

template <class T>
struct Impl {
  using Acc = Accumulator<T>;
  using V = Vector<Acc>;
  static constexpr int lanes = lanes_of<Acc>();

  template <class From>
  static void gather(const void* pixels, const PatchLayout& patch, const void* scale, const void* shift, int64_t first,
                     int64_t count, void* target) {
    auto* to = static_cast<T*>(target);
    each_line(patch, first, count, [&](int64_t channel, int64_t offset, int64_t at, int64_t length) {
      const From* from = static_cast<const From*>(pixels) + offset;
      if constexpr (__is_same(From, T)) {
        if (!scale) {
          if (patch.column_stride == 1) {
            copy_run(from, to + at, length);
          } else {
            for (int64_t i = 0; i < length; ++i) to[at + i] = from[i * patch.column_stride];
          }
          return;
        }
      }
      const Acc a = static_cast<const Acc*>(scale)[channel], b = static_cast<const Acc*>(shift)[channel];
      if (patch.column_stride == 1) {
        for (int64_t i = 0; i < length; i += lanes) {
          const int64_t some = min_of(lanes, length - i);
          store_some(to + at + i, numbers<Acc>(from + i, some) * a + b, some);
        }
      } else {
        for (int64_t i = 0; i < length; ++i) {
          to[at + i] = from_acc<T>(number<Acc>(from[i * patch.column_stride]) * a + b);
        }
      }
    });
  }

  static void scatter(const void* values, const PatchLayout& patch, const void* scale, int64_t first, int64_t count,
                      void* pixels) {
    each_line(patch, first, count, [&](int64_t channel, int64_t offset, int64_t at, int64_t length) {
      const V a = broadcast<Acc>(scale ? static_cast<const Acc*>(scale)[channel] : Acc{1});
      const Acc* from = static_cast<const Acc*>(values) + at;
      T* to = static_cast<T*>(pixels) + offset;
      for (int64_t i = 0; i < length; i += lanes) {
        const int64_t some = min_of(lanes, length - i);
        store_some(to + i, load_some(from + i, some) * a, some);
      }
    });
  }

  static void add(const void* c, const void* first, const void* second, int64_t n, void* out) {
    for (int64_t i = 0; i < n; i += lanes) {
      const int64_t count = min_of(lanes, n - i);
      V sum = c ? load_some(static_cast<const Acc*>(c) + i, count) : V{};
      if (first) sum += load_some(static_cast<const T*>(first) + i, count);
      if (second) sum += load_some(static_cast<const T*>(second) + i, count);
      store_some(static_cast<T*>(out) + i, sum, count);
    }
  }

  // Long sums are sums of sums of kTerms rows, whose rounding errors grow with the root of the length only.
  static constexpr int64_t kTerms = 64;
  template <int vectors>
  static void sum_columns(const T* rows, int64_t stride, const int64_t* index, int64_t count, int64_t width,
                          Acc* sums) {
    V total[vectors] = {};
    for (int64_t first = 0; first < count; first += kTerms) {
      V part[vectors] = {};
      for (int64_t i = first; i < min_of(count, first + kTerms); ++i) {
        const T* row = rows + (index ? index[i] : i) * stride;
        for (int v = 0; v < vectors; ++v) part[v] += load_some(row + v * lanes, width - v * lanes);
      }
      for (int v = 0; v < vectors; ++v) total[v] += part[v];
    }
    for (int v = 0; v < vectors; ++v) store_some(sums + v * lanes, total[v], width - v * lanes);
  }
  static void sum_rows(const void* rows, int64_t stride, const int64_t* index, int64_t count, int64_t n, void* sums) {
    constexpr int64_t wide = 4 * lanes;
    const auto* from = static_cast<const T*>(rows);
    auto* to = static_cast<Acc*>(sums);
    int64_t j = 0;
    for (; j + wide <= n; j += wide) sum_columns<4>(from + j, stride, index, count, wide, to + j);
    for (; j < n; j += lanes) sum_columns<1>(from + j, stride, index, count, min_of(lanes, n - j), to + j);
  }

  static constexpr PatchLoops loops{&gather<T>, &gather<uint8_t>, &scatter, &add, &sum_rows};
};

}  // namespace

const PatchTable& patch_table() {
  static constexpr PatchTable table{{Impl<float>::loops, Impl<double>::loops, Impl<bf16>::loops, Impl<f16>::loops}};
  return table;
}

}  // namespace pymm::PYMM_ISA
