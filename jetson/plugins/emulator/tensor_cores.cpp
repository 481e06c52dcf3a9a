// ldmatrix and mma of cuda_emulator.h.
#include "cuda_emulator.h"

namespace orin::emulator {
namespace {

constexpr uint32_t kWarp = 0xffffffffu;

struct Load {
  const void* row;
  uint32_t* results;
};

struct Multiply {
  float* c;
  Left a;
  Right b;
};

float half_of(uint32_t pair, int which) { return __half2float({uint16_t(pair >> 16 * which)}); }

// Products are exact in fp64; they are summed there and rounded once. The hardware sums in fp32 in an order, and with a
// rounding, of its own.
void multiply(Multiply** lanes) {
  double a[16][16], b[16][8], c[16][8];
  for (int i = 0; i < kLanes; ++i) {
    int g = i / 4, t = i % 4;
    const uint32_t *left = lanes[i]->a.of, *right = lanes[i]->b.of;
    for (int which = 0; which < 2; ++which) {
      int k = 2 * t + which;
      a[g][k] = half_of(left[0], which), a[g + 8][k] = half_of(left[1], which);
      a[g][k + 8] = half_of(left[2], which), a[g + 8][k + 8] = half_of(left[3], which);
      b[k][g] = half_of(right[0], which), b[k + 8][g] = half_of(right[1], which);
      c[g][k] = lanes[i]->c[which], c[g + 8][k] = lanes[i]->c[2 + which];
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int i = 0; i < kLanes; ++i)
    for (int e = 0; e < 4; ++e) lanes[i]->c[e] = float(c[i / 4 + 8 * (e / 2)][2 * (i % 4) + e % 2]);
}

}  // namespace

void load_matrices(uint32_t* results, const void* row, int count, bool transpose) {
  Load mine{row, results};
  collective(kWarp, transpose ? "ldmatrix.trans" : "ldmatrix", mine, [=](Load** lanes) {
    for (int matrix = 0; matrix < count; ++matrix) {
      uint16_t elements[8][8];
      for (int i = 0; i < 8; ++i) {
        check_aligned(lanes[8 * matrix + i]->row, 16, "ldmatrix");
        std::memcpy(elements[i], lanes[8 * matrix + i]->row, 16);
      }
      for (int i = 0; i < kLanes; ++i) {
        int g = i / 4, t = i % 4;
        uint16_t low = transpose ? elements[2 * t][g] : elements[g][2 * t];
        uint16_t high = transpose ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
        lanes[i]->results[matrix] = low | uint32_t(high) << 16;
      }
    }
  });
}

void multiply_16816(float* c, Left a, Right b) {
  Multiply mine{c, a, b};
  collective(kWarp, "mma.m16n8k16", mine, multiply);
}

}  // namespace orin::emulator
