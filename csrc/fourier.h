// Fourier transforms along time of kLanes channels at once.
//
// 2P real frames x fold into P complex coefficients z[n] = x[n] + i x[n + P], a polynomial modulo t^P - i. Products of
// such polynomials are convolutions of the real signals modulo t^2P + 1: what runs over the end comes back negated. So
// real signals need no transform of twice the size, no frequency is special, and the first P frames of a result are
// its real part.
//
// The transform is the polynomial's remainder at each of the P roots. A node holds a polynomial modulo t^L - c; a pass
// splits every node into kRadix nodes modulo t^(L / kRadix) - c', in place. The roots come in the order in which that
// tree is walked: a product takes them one by one in any order, and the inverse walks back.
#pragma once

#include "vec.h"

namespace wavlm_fast {
namespace WAVLM_FAST_ISA {

struct Complex {
  Floats re, im;
};

WAVLM_FAST_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
WAVLM_FAST_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }

WAVLM_FAST_INLINE Complex load_complex(const float* from) { return {load(from), load(from + kLanes)}; }

WAVLM_FAST_INLINE void store_complex(float* to, Complex value) {
  store(to, value.re);
  store(to + kLanes, value.im);
}

// Times i or, with kSign = -1, times -i.
template <int kSign>
WAVLM_FAST_INLINE Complex turned(Complex a) {
  return kSign > 0 ? Complex{-a.im, a.re} : Complex{a.im, -a.re};
}

// Times the number at `root` or, with kSign = -1, times its conjugate.
template <int kSign>
WAVLM_FAST_INLINE Complex times(Complex a, const float* root) {
  const Floats re = splat(root[0]), im = splat(root[1]);
  return kSign > 0 ? Complex{a.re * re - a.im * im, a.im * re + a.re * im}
                   : Complex{a.re * re + a.im * im, a.im * re - a.re * im};
}

// a[j] = sum over s of a[s] * exp(kSign * 2 pi i j s / radix).
template <int kSign>
WAVLM_FAST_INLINE void butterfly(Complex (&a)[4]) {
  const Complex even = a[0] + a[2], even_odd = a[0] - a[2], odd = a[1] + a[3];
  const Complex odd_odd = turned<kSign>(a[1] - a[3]);
  a[0] = even + odd, a[1] = even_odd + odd_odd, a[2] = even - odd, a[3] = even_odd - odd_odd;
}

template <int kSign>
WAVLM_FAST_INLINE void butterfly(Complex (&a)[8]) {
  Complex even[4] = {a[0], a[2], a[4], a[6]}, odd[4] = {a[1], a[3], a[5], a[7]};
  butterfly<kSign>(even);
  butterfly<kSign>(odd);
  const Floats half = splat(0.707106781f);
  const Complex once = odd[1] + turned<kSign>(odd[1]), thrice = turned<kSign>(odd[3]) - odd[3];
  odd[1] = {once.re * half, once.im * half};
  odd[2] = turned<kSign>(odd[2]);
  odd[3] = {thrice.re * half, thrice.im * half};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) a[j] = even[j] + odd[j], a[j + 4] = even[j] - odd[j];
}

// Numbers of the table of roots that a node of a pass reads: re and im of the powers 1 .. radix - 1.
constexpr int roots_of_node(int radix) { return 2 * (radix - 1); }

// Coefficient n is what load(n) gives, or is handed to store(n, value). `below` is the length of the nodes made.
template <int kRadix, class Load, class Store>
WAVLM_FAST_INLINE void split(std::int64_t nodes, std::int64_t below, const float* roots, const Load& load,
                             const Store& store) {
  for (std::int64_t node = 0; node < nodes; ++node, roots += roots_of_node(kRadix)) {
    for (std::int64_t n = node * kRadix * below; n < (node * kRadix + 1) * below; ++n) {
      Complex a[kRadix];
      a[0] = load(n);
#pragma GCC unroll 8
      for (int s = 1; s < kRadix; ++s) a[s] = times<1>(load(n + s * below), roots + 2 * (s - 1));
      butterfly<1>(a);
#pragma GCC unroll 8
      for (int s = 0; s < kRadix; ++s) store(n + s * below, a[s]);
    }
  }
}

// Undoes `split`, times kRadix.
template <int kRadix, class Load, class Store>
WAVLM_FAST_INLINE void join(std::int64_t nodes, std::int64_t below, const float* roots, const Load& load,
                            const Store& store) {
  for (std::int64_t node = 0; node < nodes; ++node, roots += roots_of_node(kRadix)) {
    for (std::int64_t n = node * kRadix * below; n < (node * kRadix + 1) * below; ++n) {
      Complex a[kRadix];
#pragma GCC unroll 8
      for (int s = 0; s < kRadix; ++s) a[s] = load(n + s * below);
      butterfly<-1>(a);
      store(n, a[0]);
#pragma GCC unroll 8
      for (int s = 1; s < kRadix; ++s) store(n + s * below, times<-1>(a[s], roots + 2 * (s - 1)));
    }
  }
}

// What the entry knows of the transforms: P, a power of two of at least 16, and the roots of all passes.
struct Transform {
  std::int64_t P;
  const float* roots;

  // The first pass is of radix 8 where radix 4 alone does not come out even.
  bool eight_first() const { return (P & 0x5555555555555555) == 0; }

  // load(n) gives coefficient n, store(f, value) takes the value at root f. `work` is memory for [P][re, im][kLanes].
  template <class Load, class Store>
  WAVLM_FAST_INLINE void forward(float* work, const Load& load, const Store& store) const {
    const auto held = [=](std::int64_t n) { return load_complex(work + 2 * kLanes * n); };
    const auto hold = [=](std::int64_t n, Complex value) { store_complex(work + 2 * kLanes * n, value); };
    const float* at = roots;
    std::int64_t nodes = eight_first() ? 8 : 4;
    if (nodes == 8) {
      split<8>(1, P / 8, at, load, hold);
    } else {
      split<4>(1, P / 4, at, load, hold);
    }
    at += roots_of_node(static_cast<int>(nodes));
    for (; 4 * nodes < P; nodes *= 4) {
      split<4>(nodes, P / nodes / 4, at, held, hold);
      at += nodes * roots_of_node(4);
    }
    split<4>(nodes, 1, at, held, store);
  }

  // The same with `work` itself taking the values, [P][re, im][kLanes].
  template <class Load>
  WAVLM_FAST_INLINE void forward(float* work, const Load& load) const {
    forward(work, load, [=](std::int64_t f, Complex value) { store_complex(work + 2 * kLanes * f, value); });
  }

  // load(f) gives the value at root f, store(n, value) takes P times coefficient n.
  template <class Load, class Store>
  WAVLM_FAST_INLINE void inverse(float* work, const Load& load, const Store& store) const {
    const auto held = [=](std::int64_t n) { return load_complex(work + 2 * kLanes * n); };
    const auto hold = [=](std::int64_t n, Complex value) { store_complex(work + 2 * kLanes * n, value); };
    const std::int64_t first = eight_first() ? 8 : 4;
    std::int64_t nodes = P / 4;
    const float* at = roots + roots_of_node(static_cast<int>(first)) + (nodes - first) / 3 * roots_of_node(4);
    join<4>(nodes, 1, at, load, hold);
    for (nodes /= 4; nodes >= first; nodes /= 4) {
      at -= nodes * roots_of_node(4);
      join<4>(nodes, P / nodes / 4, at, held, hold);
    }
    if (first == 8) {
      join<8>(1, P / 8, roots, held, store);
    } else {
      join<4>(1, P / 4, roots, held, store);
    }
  }
};

}  // namespace WAVLM_FAST_ISA
}  // namespace wavlm_fast
