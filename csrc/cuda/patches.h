// The operands of patch embedding's products, read where they lie, and where the results go.
//
// An operand is a matrix: number(row, i) is its element in the accumulator's type, 0 outside; copy(to, row, i) brings
// eight neighbours of a row to shared memory. It has `rows` rows of `width` numbers.
#pragma once

#include "cuda/tensor_core.h"
#include "cuda/tile.h"

namespace pymm::cuda {

// A dense matrix.
template <class T>
struct Matrix {
  const T* p;
  int64_t rows, width;
  bool aligned;  // every row begins at a multiple of 16 bytes, and eight numbers at a time end with it

  PYMM_DEVICE Accumulator<T> number(int64_t row, int64_t i) const {
    return row < rows && i < width ? Accumulator<T>(to_float(p[row * width + i])) : Accumulator<T>(0);
  }
  PYMM_DEVICE void copy(T* to, int64_t row, int64_t i) const {
    const bool inside = row < rows && i < width;
    if (aligned) {
      copy_async(to, inside ? p + row * width + i : p, inside ? kChunk : 0);
    } else {
      for (int j = 0; j < 8; ++j) to[j] = inside && i + j < width ? p[row * width + i + j] : from_float(0.0f, T{});
    }
  }
};

// The grid of patches of a batch, and which of them are computed: `shown` of each image, all or those of `keep`.
struct Grid {
  int64_t images, patches, shown, columns, channels, height, width;  // columns of patches; numbers of a patch
  const int64_t* keep;

  PYMM_DEVICE int64_t patch(int64_t row) const {
    const int64_t n = keep == nullptr ? row % shown : keep[row];
    if (n < 0 || n >= patches) PYMM_TRAP();
    return n;
  }
};

// The pixels of the patches, a patch per row, normalized and rounded to the weight's type T.
template <class T>
struct Pixels {
  using Acc = Accumulator<T>;
  const void* p;
  bool bytes;                            // uint8, else T
  bool eight;                            // eight neighbours of a row may be copied as they lie
  int64_t batch, channel, line, column;  // strides
  const Acc *mean, *std;
  Grid grid;
  int64_t rows, width;

  PYMM_DEVICE int64_t base(int64_t row) const {
    const int64_t n = grid.patch(row);
    return row / grid.shown * batch + n / grid.columns * grid.height * line + n % grid.columns * grid.width * column;
  }
  PYMM_DEVICE int64_t offset(int64_t number) const {
    // A patch has fewer than 2^31 numbers, and 64-bit divisions are slow.
    const uint32_t i = static_cast<uint32_t>(number), across = static_cast<uint32_t>(grid.width);
    const uint32_t area = static_cast<uint32_t>(grid.height) * across;
    return i / area * channel + i % area / across * line + i % across * column;
  }
  PYMM_DEVICE T value(int64_t at, int64_t i) const {
    if (!bytes && mean == nullptr && std == nullptr) return static_cast<const T*>(p)[at];
    Acc x = bytes ? Acc(static_cast<const uint8_t*>(p)[at]) / Acc(255) : Acc(to_float(static_cast<const T*>(p)[at]));
    const uint32_t c = static_cast<uint32_t>(i) / static_cast<uint32_t>(grid.height * grid.width);
    if (mean != nullptr) x -= mean[c];
    if (std != nullptr) x /= std[c];
    return from_float(x, T{});
  }
  PYMM_DEVICE Acc number(int64_t row, int64_t i) const {
    return row < rows && i < width ? Acc(to_float(value(base(row) + offset(i), i))) : Acc(0);
  }
  PYMM_DEVICE void copy(T* to, int64_t row, int64_t i) const {
    const bool inside = row < rows && i < width;
    const int64_t from = inside ? base(row) : 0;
    if (eight) {
      copy_async(to, static_cast<const T*>(p) + (inside ? from + offset(i) : 0), inside ? kChunk : 0);
      return;
    }
    for (int j = 0; j < 8; ++j) {
      to[j] = inside && i + j < width ? value(from + offset(i + j), i + j) : from_float(0.0f, T{});
    }
  }
};

// The gradient of the tokens that are patches, a token per row; 0 where the patch was masked.
template <class T>
struct Tokens {
  const T* dout;
  const uint8_t* mask;  // (images, patches), or null
  Grid grid;
  int64_t prefix, rows, width;
  bool aligned;

  PYMM_DEVICE bool hidden(int64_t row) const {
    return mask != nullptr && mask[row / grid.shown * grid.patches + grid.patch(row)] != 0;
  }
  PYMM_DEVICE const T* at(int64_t row) const {
    return dout + (row / grid.shown * (prefix + grid.shown) + prefix + row % grid.shown) * width;
  }
  PYMM_DEVICE Accumulator<T> number(int64_t row, int64_t i) const {
    const bool inside = row < rows && i < width && !hidden(row);
    return inside ? Accumulator<T>(to_float(at(row)[i])) : Accumulator<T>(0);
  }
  PYMM_DEVICE void copy(T* to, int64_t row, int64_t i) const {
    const bool inside = row < rows && i < width && !hidden(row);
    if (aligned) {
      copy_async(to, inside ? at(row) + i : dout, inside ? kChunk : 0);
    } else {
      for (int j = 0; j < 8; ++j) to[j] = inside && i + j < width ? at(row)[i + j] : from_float(0.0f, T{});
    }
  }
};

// Tokens: bias or mask token, and position, are added before the result is rounded.
template <class T>
struct StoreTokens {
  T* out;
  const T *bias, *token, *position;  // position's rows are the patches'
  const uint8_t* mask;
  Grid grid;
  int64_t prefix, channels;

  PYMM_DEVICE void operator()(int64_t row, int64_t c, Accumulator<T> value) const {
    const int64_t image = row / grid.shown, n = grid.patch(row);
    if (bias != nullptr) value += to_float(bias[c]);
    if (mask != nullptr && mask[image * grid.patches + n] != 0) value = to_float(token[c]);
    if (position != nullptr) value += to_float(position[n * channels + c]);
    out[(image * (prefix + grid.shown) + prefix + row % grid.shown) * channels + c] = from_float(value, T{});
  }
};

template <class T>
struct StoreMatrix {
  T* out;
  int64_t width;
  PYMM_DEVICE void operator()(int64_t row, int64_t i, Accumulator<T> value) const {
    out[row * width + i] = from_float(value, T{});
  }
};

// The gradient of the pixels, dense (images, channels, lines, columns); each patch is a row.
template <class T>
struct StorePixels {
  Pixels<T> place;  // of the result
  T* out;
  PYMM_DEVICE void operator()(int64_t row, int64_t i, Accumulator<T> value) const {
    if (place.std != nullptr) value /= place.std[i / (place.grid.height * place.grid.width)];
    out[place.base(row) + place.offset(i)] = from_float(value, T{});
  }
};

}  // namespace pymm::cuda
