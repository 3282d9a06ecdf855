// The loops that a U-Net runs between its matrix products, for the CPU.
//
// Plain C++17 and OpenMP: each inner loop runs along the channels, which lie next to each other in
// memory (channels last), and is simple enough for the compiler to turn into vector instructions
// of whatever width the machine has. Values are read and written as bfloat16 or float32 (`T`);
// all arithmetic between is float32, sums over many values are finished in float64.
//
// Sums are taken over blocks whose size follows from the shape alone and are added in a fixed
// order: results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define SIMD _Pragma("omp simd")
#define LOOP __attribute__((noinline))  // compiled once, not once per place that calls it

namespace {

using i64 = int64_t;
using bf16 = uint16_t;  // the upper half of a float32

// ---------------------------------------------------------------------------- numbers

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return as_float(static_cast<uint32_t>(value) << 16); }

inline void put(float& place, float value) { place = value; }

// Round to nearest, ties to even. A NaN is put down as such: rounding up could carry out of it.
inline void put(bf16& place, float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    place = static_cast<bf16>(value != value ? 0x7fffu : rounded);
}

// e^x for x in [-87, 88], relative error below 2e-7. x = n ln 2 + r with |r| <= ln(2)/2; ln 2 is
// split in two so that r is exact, 2^n is written into the exponent, e^r is a minimax polynomial.
// Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
inline float exp_between(float x) {
    const float magic = 12582912.0f;
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 8.31252731e-3f;
    p = p * r + 4.18901179e-2f;
    p = p * r + 1.66671145e-1f;
    p = p * r + 4.99992318e-1f;
    p = p * r * r + r + 1.0f;
    return p * as_float((as_bits(shifted) + 127u) << 23);
}

// Comparisons are written so that a NaN passes.
inline float at_least(float x, float low) { return x < low ? low : x; }
inline float at_most(float x, float high) { return x > high ? high : x; }

// ---------------------------------------------------------------------------- activations
//
// value: f(u); slope: f'(u). Both have their limits at u = +-inf (to 1e-36) and keep NaN.

struct None {
    static float value(float u) { return u; }
    static float slope(float) { return 1.0f; }
};

struct Relu {
    static float value(float u) { return u < 0.0f ? 0.0f : u; }
    static float slope(float u) { return u > 0.0f ? 1.0f : 0.0f; }
};

// u sigmoid(u), and sigmoid(u) (1 + u sigmoid(-u)).
struct Silu {
    static float value(float u) {
        const float e = exp_between(at_least(-at_least(u, -88.0f), -87.0f));
        return at_least(u, -88.0f) / (1.0f + e);
    }
    static float slope(float u) {
        const float v = at_most(at_least(u, -87.0f), 87.0f);
        const float e = exp_between(-v);
        const float sigmoid = 1.0f / (1.0f + e);
        return sigmoid * (1.0f + v * (e * sigmoid));
    }
};

// u Phi(u), Phi the normal distribution (the exact form, not the tanh one). With t = |u|, the tail
// Phi(-t) is exp(-t^2/2) R(t); R is smooth and fitted by a polynomial in s = 1 / (1 + 0.3 t),
// relative error 5e-7 for t <= 13, roundings included.
struct Gelu {
    static float gauss(float t) { return exp_between(-0.5f * t * t); }
    static float cumulative(float u, float t, float e) {
        const float s = 1.0f / (1.0f + 0.3f * t);
        float p = 3.6036194e-2f;
        p = p * s - 1.58713187e-1f;
        p = p * s + 2.08963903e-1f;
        p = p * s - 5.60952847e-2f;
        p = p * s + 1.29843119e-1f;
        p = p * s + 9.95231494e-2f;
        p = p * s + 1.20816879e-1f;
        p = p * s + 1.19625166e-1f;
        const float tail = e * p * s;
        return u < 0.0f ? tail : 1.0f - tail;
    }
    static float value(float u) {
        const float v = at_least(u, -13.0f), t = at_most(std::fabs(v), 13.0f);
        return v * cumulative(v, t, gauss(t));
    }
    static float slope(float u) {
        const float v = at_most(at_least(u, -13.0f), 13.0f), t = std::fabs(v), e = gauss(t);
        return cumulative(v, t, e) + v * e * 0.398942280f;  // 1 / sqrt(2 pi)
    }
};

// ---------------------------------------------------------------------------- threads

// Either one thread or all: a team of another size would make OpenMP start threads anew.
inline int worth(i64 elements, int threads) { return elements < 32768 ? 1 : threads; }

template <class Body>
void parallel(i64 count, int threads, Body body) {
    if (threads <= 1 || count <= 1) {
        for (i64 i = 0; i < count; ++i) body(i);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < count; ++i) body(i);
}

// body(picture, threads for this picture). Whole pictures per thread stay in its own cache; few
// pictures are shared out block by block instead.
template <class Body>
void each_picture(i64 pictures, int threads, Body body) {
    if (threads > 1 && pictures % threads != 0 && pictures < 4 * threads) {
        for (i64 i = 0; i < pictures; ++i) body(i, threads);
    } else {
        parallel(pictures, threads, [&](i64 i) { body(i, 1); });
    }
}

// Working memory that a thread keeps between calls: fresh memory costs a page fault per 4 KiB.
float* scratch(i64 floats) {
    thread_local std::vector<float> memory;
    if (static_cast<i64>(memory.size()) < floats) memory.resize(floats);
    return memory.data();
}

// Pixels are summed in blocks that fit the first cache.
struct Blocks {
    i64 pixels, size, count;
    Blocks(i64 pixels, i64 channels) : pixels(pixels) {
        size = channels < 8192 ? 8192 / channels : 1;
        count = (pixels + size - 1) / size;
    }
    i64 begin(i64 j) const { return j * size; }
    i64 length(i64 j) const { return j * size + size <= pixels ? size : pixels - j * size; }
};

// Adds the blocks' rows of sums, in order: total[k] += parts[j * stride + k].
void add_blocks(const float* parts, i64 blocks, i64 stride, i64 channels, double* total) {
    for (i64 j = 0; j < blocks; ++j) {
        const float* row = parts + j * stride;
        SIMD for (i64 k = 0; k < channels; ++k) total[k] += row[k];
    }
}

// ---------------------------------------------------------------------------- group norm
//
// v = x + add;  n = (v - mean) / std;  u = (n weight + bias) (1 + scale) + shift;  y = act(u)
//
// mean and std over the pixels and channels of a group of one picture. Everything but `act` is one
// multiplication and one addition per channel once mean and std are known: u = gain x + offset.

struct Norm {
    i64 pictures, pixels, channels, groups;
    const float *weight, *bias, *add, *scale, *shift;  // the last three may be null
    float* stats;                                      // (picture, group, 2): mean, 1 / std
    int threads;

    i64 width() const { return channels / groups; }
    const float* row(const float* table, i64 i) const {
        return table ? table + i * channels : nullptr;
    }
    static float at(const float* row, i64 k) { return row ? row[k] : 0.0f; }
};

// Per channel, over a block's pixels: the sum of x, then that of (x - mean)^2 with the block's own
// mean. A second pass over a block in the first cache is cheap, and nothing cancels.
template <class T>
LOOP void block_moments(const T* x, i64 pixels, i64 channels, float* sum, float* square) {
    std::memset(sum, 0, channels * sizeof(float));
    std::memset(square, 0, channels * sizeof(float));
    for (i64 p = 0; p < pixels; ++p) {
        const T* row = x + p * channels;
        SIMD for (i64 k = 0; k < channels; ++k) sum[k] += widen(row[k]);
    }
    const float share = 1.0f / static_cast<float>(pixels);
    for (i64 p = 0; p < pixels; ++p) {
        const T* row = x + p * channels;
        SIMD for (i64 k = 0; k < channels; ++k) {
            const float d = widen(row[k]) - share * sum[k];
            square[k] += d * d;
        }
    }
}

// Sums of squares about the means of the groups, per channel: those about the blocks' means, and
// those of the blocks' means.
void add_squares(const Blocks& blocks, i64 channels, const float* moments, const double* centre,
                 double* total) {
    for (i64 j = 0; j < blocks.count; ++j) {
        const float *sum = moments + 2 * j * channels, *square = sum + channels;
        const double size = static_cast<double>(blocks.length(j)), share = 1.0 / size;
        SIMD for (i64 k = 0; k < channels; ++k) {
            const double d = sum[k] * share - centre[k];
            total[k] += square[k] + size * d * d;
        }
    }
}

// Mean and 1/std of each group of one picture from the moments of its blocks.
void combine(const Norm& a, const Blocks& blocks, i64 i, double eps, const float* moments) {
    const float* add = a.row(a.add, i);
    const double count = static_cast<double>(a.pixels) * a.width();
    std::vector<double> total(a.channels), centre(a.channels);
    add_blocks(moments, blocks.count, 2 * a.channels, a.channels, total.data());
    for (i64 g = 0; g < a.groups; ++g) {
        double mean = 0.0;
        for (i64 k = g * a.width(); k < (g + 1) * a.width(); ++k)
            mean += total[k] / count + a.at(add, k) / static_cast<double>(a.width());
        for (i64 k = g * a.width(); k < (g + 1) * a.width(); ++k) centre[k] = mean - a.at(add, k);
        a.stats[(i * a.groups + g) * 2] = static_cast<float>(mean);
    }
    std::fill(total.begin(), total.end(), 0.0);
    add_squares(blocks, a.channels, moments, centre.data(), total.data());
    for (i64 g = 0; g < a.groups; ++g) {
        double square = 0.0;
        for (i64 k = g * a.width(); k < (g + 1) * a.width(); ++k) square += total[k];
        a.stats[(i * a.groups + g) * 2 + 1] =
            static_cast<float>(1.0 / std::sqrt(square / count + eps));
    }
}

// u = gain x + offset, for each channel of one picture.
void affine(const Norm& a, i64 i, float* gain, float* offset) {
    const float *add = a.row(a.add, i), *scale = a.row(a.scale, i), *shift = a.row(a.shift, i);
    for (i64 k = 0; k < a.channels; ++k) {
        const float* stats = a.stats + (i * a.groups + k / a.width()) * 2;
        const double by = 1.0 + a.at(scale, k);
        gain[k] = static_cast<float>(stats[1] * a.weight[k] * by);
        const double centre = static_cast<double>(a.at(add, k)) - stats[0];
        offset[k] = static_cast<float>(centre * gain[k] + a.bias[k] * by + a.at(shift, k));
    }
}

template <class T, class Act>
LOOP void apply(const T* x, T* y, i64 pixels, i64 channels, const float* gain,
                const float* offset) {
    for (i64 p = 0; p < pixels; ++p) {
        const T* from = x + p * channels;
        T* to = y + p * channels;
        SIMD for (i64 k = 0; k < channels; ++k)
            put(to[k], Act::value(gain[k] * widen(from[k]) + offset[k]));
    }
}

template <class T, class Act>
void norm_act(const Norm& a, const T* x, T* y, double eps, bool known) {
    const Blocks blocks(a.pixels, a.channels);
    const i64 c = a.channels, picture = a.pixels * c;
    each_picture(a.pictures, a.threads, [&](i64 i, int threads) {
        float* gain = scratch((2 + 2 * blocks.count) * c);
        float *offset = gain + c, *moments = gain + 2 * c;
        if (!known) {
            parallel(blocks.count, threads, [&](i64 j) {
                float* sum = moments + 2 * j * c;
                const T* from = x + i * picture + blocks.begin(j) * c;
                block_moments(from, blocks.length(j), c, sum, sum + c);
            });
            combine(a, blocks, i, eps, moments);
        }
        affine(a, i, gain, offset);
        parallel(blocks.count, threads, [&](i64 j) {
            const i64 at = i * picture + blocks.begin(j) * c;
            apply<T, Act>(x + at, y + at, blocks.length(j), c, gain, offset);
        });
    });
}

// The way back. With du = dy act'(u), dn = du (1 + scale), h = dn weight and m1, m2 the means over
// a group of h and h n:
//
//     dx = dv = (h - m1 - n m2) / std
//
// and all other gradients follow from three sums over the pixels of each channel: du, du n, n.

struct NormGrads {
    float *du, *dun;                          // (picture, channel): sums of du and du n
    float *weight, *bias, *add, *scale;       // the last two may be null; that of shift is du
};

template <class T, class Act>
LOOP void block_sums(const T* dy, const T* x, i64 pixels, i64 channels, const float* gain,
                     float* sums) {
    const float* offset = gain + channels;
    const float *inverse = gain + 2 * channels, *centre = gain + 3 * channels;
    float *du = sums, *dun = sums + channels, *n = sums + 2 * channels;
    std::memset(sums, 0, 3 * channels * sizeof(float));
    for (i64 p = 0; p < pixels; ++p) {
        const T *slope = dy + p * channels, *value = x + p * channels;
        SIMD for (i64 k = 0; k < channels; ++k) {
            const float v = widen(value[k]);
            const float d = widen(slope[k]) * Act::slope(gain[k] * v + offset[k]);
            const float normed = inverse[k] * v + centre[k];
            du[k] += d;
            dun[k] += d * normed;
            n[k] += normed;
        }
    }
}

// n = inverse x + centre.
void standard(const Norm& a, i64 i, float* inverse, float* centre) {
    const float* add = a.row(a.add, i);
    for (i64 k = 0; k < a.channels; ++k) {
        const float* stats = a.stats + (i * a.groups + k / a.width()) * 2;
        inverse[k] = stats[1];
        centre[k] = static_cast<float>((static_cast<double>(a.at(add, k)) - stats[0]) * stats[1]);
    }
}

// From the sums (du, du n, n) of one picture: dx = by_du du + by_x x + rest per channel, and dadd.
void backward_coefficients(const Norm& a, const NormGrads& grads, i64 i, const double* total,
                           float* by_du, float* by_x, float* rest) {
    const i64 c = a.channels, w = a.width();
    const float *add = a.row(a.add, i), *scale = a.row(a.scale, i);
    const double count = static_cast<double>(a.pixels) * w;
    for (i64 g = 0; g < a.groups; ++g) {
        const double mean = a.stats[(i * a.groups + g) * 2];
        const double inverse = a.stats[(i * a.groups + g) * 2 + 1];
        double m1 = 0.0, m2 = 0.0;
        for (i64 k = g * w; k < (g + 1) * w; ++k) {
            const double by = a.weight[k] * (1.0 + a.at(scale, k));
            m1 += by * total[k] / count;
            m2 += by * total[c + k] / count;
            by_du[k] = static_cast<float>(by * inverse);
        }
        for (i64 k = g * w; k < (g + 1) * w; ++k) {
            const double own = by_du[k] * total[k], n = total[2 * c + k];
            const double sum = own - inverse * (static_cast<double>(a.pixels) * m1 + n * m2);
            if (grads.add) grads.add[i * c + k] = static_cast<float>(sum);
            by_x[k] = static_cast<float>(-m2 * inverse * inverse);
            rest[k] = static_cast<float>(by_x[k] * (a.at(add, k) - mean) - m1 * inverse);
        }
    }
}

template <class T, class Act>
LOOP void backward_apply(const T* dy, const T* x, T* dx, i64 pixels, i64 channels,
                         const float* gain, const float* offset, const float* by_du,
                         const float* by_x, const float* rest) {
    for (i64 p = 0; p < pixels; ++p) {
        const T *slope = dy + p * channels, *value = x + p * channels;
        T* to = dx + p * channels;
        SIMD for (i64 k = 0; k < channels; ++k) {
            const float v = widen(value[k]);
            const float du = widen(slope[k]) * Act::slope(gain[k] * v + offset[k]);
            put(to[k], by_du[k] * du + (by_x[k] * v + rest[k]));
        }
    }
}

// Sums over the pictures, in order.
void parameter_grads(const Norm& a, const NormGrads& grads) {
    for (i64 k = 0; k < a.channels; ++k) {
        double weight = 0.0, bias = 0.0;
        for (i64 i = 0; i < a.pictures; ++i) {
            const i64 at = i * a.channels + k;
            const double by = a.scale ? 1.0 + a.scale[at] : 1.0;
            weight += by * grads.dun[at];
            bias += by * grads.du[at];
            if (grads.scale)
                grads.scale[at] = a.weight[k] * grads.dun[at] + a.bias[k] * grads.du[at];
        }
        grads.weight[k] = static_cast<float>(weight);
        grads.bias[k] = static_cast<float>(bias);
    }
}

template <class T, class Act>
void norm_act_backward(const Norm& a, const NormGrads& grads, const T* dy, const T* x, T* dx) {
    const Blocks blocks(a.pixels, a.channels);
    const i64 c = a.channels, picture = a.pixels * c;
    each_picture(a.pictures, a.threads, [&](i64 i, int threads) {
        float* gain = scratch((7 + 3 * blocks.count) * c);
        float *offset = gain + c, *inverse = gain + 2 * c, *centre = gain + 3 * c;
        float *by_du = gain + 4 * c, *by_x = gain + 5 * c, *rest = gain + 6 * c;
        float* sums = gain + 7 * c;
        affine(a, i, gain, offset);
        standard(a, i, inverse, centre);
        parallel(blocks.count, threads, [&](i64 j) {
            const i64 at = i * picture + blocks.begin(j) * c;
            block_sums<T, Act>(dy + at, x + at, blocks.length(j), c, gain, sums + 3 * j * c);
        });
        std::vector<double> total(3 * c);
        add_blocks(sums, blocks.count, 3 * c, 3 * c, total.data());
        std::copy_n(total.begin(), c, grads.du + i * c);
        std::copy_n(total.begin() + c, c, grads.dun + i * c);
        backward_coefficients(a, grads, i, total.data(), by_du, by_x, rest);
        parallel(blocks.count, threads, [&](i64 j) {
            const i64 at = i * picture + blocks.begin(j) * c;
            backward_apply<T, Act>(dy + at, x + at, dx + at, blocks.length(j), c, gain, offset,
                                   by_du, by_x, rest);
        });
    });
    parameter_grads(a, grads);
}

// ---------------------------------------------------------------------------- Winograd
//
// A 3x3 convolution, padding 1, as F(2x2, 3x3) of Lavin and Gray (1509.09308, section 4.1): for
// each 2x2 tile of the output, the 4x4 window d of the input around it, and a filter g,
//
//     y = A^T [ (G g G^T) * (B^T d B) ] A          (* by elements)
//
//           1  0 -1  0              1     0     0
//     B^T = 0  1  1  0        G =  1/2   1/2   1/2        A^T =  1  1  1  0
//           0 -1  1  0             1/2  -1/2   1/2               0  1 -1 -1
//           0  1  0 -1              0     0     1
//
// 16 multiplications instead of 36; summed over channels they are 16 matrix products, which torch
// does: U = G g G^T (16, out, in), V = B^T d B (16, tiles, in), M = V U^T (16, tiles, out).
// Tiles are ordered (picture, row, column). Every map here is linear, and its `_adjoint` is its
// transpose, which is all that the way back needs.

struct Tiles {
    i64 pictures, height, width, channels, rows, columns;
    Tiles(i64 b, i64 h, i64 w, i64 c)
        : pictures(b), height(h), width(w), channels(c), rows((h + 1) / 2), columns((w + 1) / 2) {}
    i64 plane() const { return pictures * rows * columns * channels; }

    // The channels of a pixel of x (b, h, w, c), or `outside` of the picture.
    template <class T>
    T* pixel(T* x, i64 picture, i64 y, i64 right, T* outside) const {
        if (y < 0 || y >= height || right < 0 || right >= width) return outside;
        return x + ((picture * height + y) * width + right) * channels;
    }
    // The channels of entry 0 ... 15 of a tile of v (16, tiles, c), or `outside`.
    template <class T>
    T* entry(T* v, int i, i64 picture, i64 row, i64 column, T* outside) const {
        if (row < 0 || row >= rows || column < 0 || column >= columns) return outside;
        return v + i * plane() + ((picture * rows + row) * columns + column) * channels;
    }
};

// Zeros to read where a window sticks out of its picture.
template <class T>
const T* zero_row(i64 channels) {
    thread_local std::vector<T> zeros;
    if (static_cast<i64>(zeros.size()) < channels) zeros.resize(channels);
    return zeros.data();
}

// Where the pixels of a tile that stick out of an odd picture are written.
template <class T>
T* spare_row(i64 channels) {
    thread_local std::vector<T> spare;
    if (static_cast<i64>(spare.size()) < channels) spare.resize(channels);
    return spare.data();
}

// work(tile row of all pictures, picture, row in it)
template <class Work>
void each_row(const Tiles& t, int threads, Work work) {
    const int worthwhile = worth(t.pictures * t.height * t.width * t.channels, threads);
    parallel(t.pictures * t.rows, worthwhile, [&](i64 i) { work(i, i / t.rows, i % t.rows); });
}

struct Two {
    float a, b;
};
struct Four {
    float a, b, c, d;
};

inline Four apply_B(float a, float b, float c, float d) { return {a - c, b + c, c - b, b - d}; }
inline Two apply_A(float a, float b, float c, float d) { return {a + b + c, b - c - d}; }
inline Four apply_A_adjoint(float a, float b) { return {a, a + b, a - b, -b}; }
inline Four apply_G(float a, float b, float c) {
    return {a, 0.5f * (a + b + c), 0.5f * (a - b + c), c};
}

template <class T>
inline void put_four(T* to, i64 step, Four v) {
    put(to[0], v.a);
    put(to[step], v.b);
    put(to[2 * step], v.c);
    put(to[3 * step], v.d);
}

// One column of a window, transformed. Pointers in a struct of their own, not in an array, are what
// gcc keeps in registers and hence can vectorise.
template <class T>
struct WindowColumn {
    const T *a, *b, *c, *d;
    WindowColumn(const T* const* rows) : a(rows[0]), b(rows[1]), c(rows[2]), d(rows[3]) {}
    Four at(i64 k) const { return apply_B(widen(a[k]), widen(b[k]), widen(c[k]), widen(d[k])); }
};

// V = B^T d B. d[4 * column + row] points to the pixels of one window.
template <class T>
LOOP void input_tile(const T* const* d, T* v, i64 plane, i64 channels) {
    const WindowColumn<T> first(d), second(d + 4), third(d + 8), fourth(d + 12);
    SIMD for (i64 k = 0; k < channels; ++k) {
        const Four p = first.at(k), q = second.at(k), r = third.at(k), s = fourth.at(k);
        put_four(v + k, plane, apply_B(p.a, q.a, r.a, s.a));
        put_four(v + k + 4 * plane, plane, apply_B(p.b, q.b, r.b, s.b));
        put_four(v + k + 8 * plane, plane, apply_B(p.c, q.c, r.c, s.c));
        put_four(v + k + 12 * plane, plane, apply_B(p.d, q.d, r.d, s.d));
    }
}

template <class T>
void winograd_input(const Tiles& t, const T* x, T* v, int threads) {
    each_row(t, threads, [&](i64 i, i64 picture, i64 row) {
        const T* zeros = zero_row<T>(t.channels);
        for (i64 column = 0; column < t.columns; ++column) {
            const T* d[16];
            for (int j = 0; j < 16; ++j)
                d[j] = t.pixel(x, picture, 2 * row - 1 + j % 4, 2 * column - 1 + j / 4, zeros);
            input_tile(d, v + (i * t.columns + column) * t.channels, t.plane(), t.channels);
        }
    });
}

// The transpose: each window gives B dV B^T to its pixels, and windows overlap. Gathered per tile:
// along one axis the pixels 2t and 2t + 1 lie in the middle of window t, and the last of window
// t - 1 falls on the first, the first of window t + 1 on the second.
inline Two apply_B_adjoint(float before, float a, float b, float c, float d, float after) {
    return {b - c + d - before, b + c - a + after};
}

template <class T>
struct AdjointColumn {
    const T *before, *a, *b, *c, *d, *after;
    AdjointColumn(const T* const* v)
        : before(v[0]), a(v[1]), b(v[2]), c(v[3]), d(v[4]), after(v[5]) {}
    Two at(i64 k) const {
        return apply_B_adjoint(widen(before[k]), widen(a[k]), widen(b[k]), widen(c[k]),
                               widen(d[k]), widen(after[k]));
    }
};

// v[6 * column + row]: what these six values are, for each of six columns.
template <class T>
LOOP void input_adjoint_tile(const T* const* v, T* const* dx, i64 channels) {
    T *const x0 = dx[0], *const x1 = dx[1], *const x2 = dx[2], *const x3 = dx[3];
    const AdjointColumn<T> left(v), c0(v + 6), c1(v + 12), c2(v + 18), c3(v + 24), right(v + 30);
    SIMD for (i64 k = 0; k < channels; ++k) {
        const Two p = left.at(k), q = c0.at(k), r = c1.at(k), s = c2.at(k), t = c3.at(k),
                  u = right.at(k);
        const Two top = apply_B_adjoint(p.a, q.a, r.a, s.a, t.a, u.a);
        const Two bottom = apply_B_adjoint(p.b, q.b, r.b, s.b, t.b, u.b);
        put(x0[k], top.a);
        put(x1[k], top.b);
        put(x2[k], bottom.a);
        put(x3[k], bottom.b);
    }
}

template <class T>
void winograd_input_adjoint(const Tiles& t, const T* dv, T* dx, int threads) {
    // Before, within and after the tile: which tile, and which row (or column) of its window.
    const int tile[6] = {-1, 0, 0, 0, 0, 1}, line[6] = {3, 0, 1, 2, 3, 0};
    each_row(t, threads, [&](i64, i64 picture, i64 row) {
        const T* zeros = zero_row<T>(t.channels);
        T* spare = spare_row<T>(t.channels);
        for (i64 column = 0; column < t.columns; ++column) {
            const T* v[36];
            for (int j = 0; j < 36; ++j)
                v[j] = t.entry(dv, 4 * line[j % 6] + line[j / 6], picture, row + tile[j % 6],
                               column + tile[j / 6], zeros);
            T* to[4];
            for (int j = 0; j < 4; ++j)
                to[j] = t.pixel(dx, picture, 2 * row + j / 2, 2 * column + j % 2, spare);
            input_adjoint_tile(v, to, t.channels);
        }
    });
}

// y = A^T M A + bias + residual.
template <class T>
LOOP void output_tile(const T* m, i64 plane, const float* bias, const T* const* residual,
                      T* const* y, i64 channels) {
    const T *const r0 = residual[0], *const r1 = residual[1], *const r2 = residual[2],
                   *const r3 = residual[3];
    T *const y0 = y[0], *const y1 = y[1], *const y2 = y[2], *const y3 = y[3];
    SIMD for (i64 k = 0; k < channels; ++k) {
        const auto column = [&](int j) {
            const T* from = m + j * plane + k;
            return apply_A(widen(from[0]), widen(from[4 * plane]), widen(from[8 * plane]),
                           widen(from[12 * plane]));
        };
        const Two p = column(0), q = column(1), r = column(2), s = column(3);
        const Two top = apply_A(p.a, q.a, r.a, s.a), bottom = apply_A(p.b, q.b, r.b, s.b);
        put(y0[k], top.a + (bias[k] + widen(r0[k])));
        put(y1[k], top.b + (bias[k] + widen(r1[k])));
        put(y2[k], bottom.a + (bias[k] + widen(r2[k])));
        put(y3[k], bottom.b + (bias[k] + widen(r3[k])));
    }
}

template <class T>
void winograd_output(const Tiles& t, const T* m, const float* bias, const T* residual, T* y,
                     int threads) {
    each_row(t, threads, [&](i64 i, i64 picture, i64 row) {
        const T* zeros = zero_row<T>(t.channels);
        const float* added = bias ? bias : zero_row<float>(t.channels);
        T* spare = spare_row<T>(t.channels);
        for (i64 column = 0; column < t.columns; ++column) {
            const T* extra[4];
            T* to[4];
            for (int j = 0; j < 4; ++j) {
                const i64 down = 2 * row + j / 2, right = 2 * column + j % 2;
                extra[j] = residual ? t.pixel(residual, picture, down, right, zeros) : zeros;
                to[j] = t.pixel(y, picture, down, right, spare);
            }
            output_tile(m + (i * t.columns + column) * t.channels, t.plane(), added, extra, to,
                        t.channels);
        }
    });
}

// dM = A dy A^T.
template <class T>
LOOP void output_adjoint_tile(const T* const* dy, T* dm, i64 plane, i64 channels) {
    SIMD for (i64 k = 0; k < channels; ++k) {
        const Four left = apply_A_adjoint(widen(dy[0][k]), widen(dy[2][k]));
        const Four right = apply_A_adjoint(widen(dy[1][k]), widen(dy[3][k]));
        put_four(dm + k, plane, apply_A_adjoint(left.a, right.a));
        put_four(dm + k + 4 * plane, plane, apply_A_adjoint(left.b, right.b));
        put_four(dm + k + 8 * plane, plane, apply_A_adjoint(left.c, right.c));
        put_four(dm + k + 12 * plane, plane, apply_A_adjoint(left.d, right.d));
    }
}

template <class T>
void winograd_output_adjoint(const Tiles& t, const T* dy, T* dm, int threads) {
    each_row(t, threads, [&](i64 i, i64 picture, i64 row) {
        const T* zeros = zero_row<T>(t.channels);
        for (i64 column = 0; column < t.columns; ++column) {
            const T* from[4];
            for (int j = 0; j < 4; ++j)
                from[j] = t.pixel(dy, picture, 2 * row + j / 2, 2 * column + j % 2, zeros);
            output_adjoint_tile(from, dm + (i * t.columns + column) * t.channels, t.plane(),
                                t.channels);
        }
    });
}

// A filter is 3x3 rows of inputs if the weights are channels last, else its transpose.
inline void transpose(const float* from, i64 rows, i64 columns, float* to) {
    for (i64 i = 0; i < rows; ++i)
        for (i64 j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
}

// U = G g G^T of one filter g (3, 3, c).
template <class T>
LOOP void weight_row(const float* g, T* u, i64 plane, i64 c) {
    SIMD for (i64 k = 0; k < c; ++k) {
        const Four p = apply_G(g[k], g[k + 3 * c], g[k + 6 * c]);
        const Four q = apply_G(g[k + c], g[k + 4 * c], g[k + 7 * c]);
        const Four r = apply_G(g[k + 2 * c], g[k + 5 * c], g[k + 8 * c]);
        put_four(u + k, plane, apply_G(p.a, q.a, r.a));
        put_four(u + k + 4 * plane, plane, apply_G(p.b, q.b, r.b));
        put_four(u + k + 8 * plane, plane, apply_G(p.c, q.c, r.c));
        put_four(u + k + 12 * plane, plane, apply_G(p.d, q.d, r.d));
    }
}

template <class T>
void winograd_weight(i64 outputs, i64 c, bool last, const float* w, T* u, int threads) {
    parallel(outputs, worth(9 * outputs * c, threads), [&](i64 o) {
        const float* g = w + o * 9 * c;
        if (!last) transpose(g, c, 9, scratch(9 * c));
        weight_row(last ? g : scratch(9 * c), u + o * c, outputs * c, c);
    });
}

struct Three {
    float a, b, c;
};
inline Three apply_G_adjoint(float a, float b, float c, float d) {
    return {a + 0.5f * (b + c), 0.5f * (b - c), 0.5f * (b + c) + d};
}

// dg = G^T dU G.
template <class T>
LOOP void weight_adjoint_row(const T* u, i64 plane, float* g, i64 c) {
    SIMD for (i64 k = 0; k < c; ++k) {
        const auto column = [&](i64 j) {
            const T* from = u + k + j * plane;
            return apply_G_adjoint(widen(from[0]), widen(from[4 * plane]), widen(from[8 * plane]),
                                   widen(from[12 * plane]));
        };
        const auto put_three = [&](float* to, Three row) {
            to[0] = row.a;
            to[c] = row.b;
            to[2 * c] = row.c;
        };
        const Three p = column(0), q = column(1), r = column(2), s = column(3);
        put_three(g + k, apply_G_adjoint(p.a, q.a, r.a, s.a));
        put_three(g + k + 3 * c, apply_G_adjoint(p.b, q.b, r.b, s.b));
        put_three(g + k + 6 * c, apply_G_adjoint(p.c, q.c, r.c, s.c));
    }
}

template <class T>
void winograd_weight_backward(i64 outputs, i64 c, bool last, const T* du, float* dw, int threads) {
    parallel(outputs, worth(9 * outputs * c, threads), [&](i64 o) {
        float* g = dw + o * 9 * c;
        weight_adjoint_row(du + o * c, outputs * c, last ? g : scratch(9 * c), c);
        if (!last) transpose(scratch(9 * c), 9, c, g);
    });
}

// ---------------------------------------------------------------------------- sums

// Sum of each channel over pictures and pixels: the gradient of a bias.
template <class T>
void channel_sum(const T* dy, i64 pixels, i64 channels, float* sum, int threads) {
    const Blocks blocks(pixels, channels);
    float* parts = scratch(blocks.count * channels);
    parallel(blocks.count, worth(pixels * channels, threads), [&](i64 j) {
        float* part = parts + j * channels;
        std::memset(part, 0, channels * sizeof(float));
        for (i64 p = blocks.begin(j); p < blocks.begin(j) + blocks.length(j); ++p) {
            const T* row = dy + p * channels;
            SIMD for (i64 k = 0; k < channels; ++k) part[k] += widen(row[k]);
        }
    });
    std::vector<double> total(channels);
    add_blocks(parts, blocks.count, channels, channels, total.data());
    std::copy(total.begin(), total.end(), sum);
}

// ---------------------------------------------------------------------------- optimiser

// A piece of one of many tensors; tensors differ too much in size to be shared out whole.
struct Piece {
    i64 tensor, begin, length;
};

std::vector<Piece> pieces_of(i64 tensors, const i64* sizes) {
    const i64 most = 16384;
    std::vector<Piece> pieces;
    for (i64 t = 0; t < tensors; ++t)
        for (i64 begin = 0; begin < sizes[t]; begin += most)
            pieces.push_back({t, begin, std::min(most, sizes[t] - begin)});
    return pieces;
}

i64 sum_of(i64 count, const i64* sizes) {
    i64 sum = 0;
    for (i64 t = 0; t < count; ++t) sum += sizes[t];
    return sum;
}

double squared_norm(i64 tensors, const i64* sizes, const float* const* grads, int threads) {
    const std::vector<Piece> pieces = pieces_of(tensors, sizes);
    std::vector<double> parts(pieces.size());
    parallel(static_cast<i64>(pieces.size()), worth(sum_of(tensors, sizes), threads), [&](i64 i) {
        const float* g = grads[pieces[i].tensor] + pieces[i].begin;
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (i64 k = 0; k < pieces[i].length; ++k) sum += static_cast<double>(g[k]) * g[k];
        parts[i] = sum;
    });
    double total = 0.0;
    for (const double part : parts) total += part;
    return total;
}

// One step of AdamW (1711.05101, algorithm 2, as torch.optim computes it) and of the average of
// the weights; every number is read and written once.
struct AdamW {
    float keep;            // 1 - lr * weight_decay
    float rate;            // lr / (1 - beta1^step)
    float beta2;
    float rest1, rest2;    // 1 - beta1, 1 - beta2: from float64, where nothing cancels
    float inverse_root;    // 1 / sqrt(1 - beta2^step)
    float eps;
    float grad_scale, ema_weight;
};

void adamw_piece(const AdamW& o, i64 count, float* p, const float* g, float* m, float* v,
                 float* ema) {
    SIMD for (i64 k = 0; k < count; ++k) {
        const float grad = o.grad_scale * g[k];
        m[k] += o.rest1 * (grad - m[k]);
        v[k] = o.beta2 * v[k] + o.rest2 * grad * grad;
        p[k] = o.keep * p[k] - o.rate * m[k] / (std::sqrt(v[k]) * o.inverse_root + o.eps);
        ema[k] += o.ema_weight * (p[k] - ema[k]);
    }
}

// Entry points choose types and activations once, outside of all loops.
template <class Body>
void with_type(int is_bf16, Body body) {
    is_bf16 ? body(bf16{}) : body(float{});
}

template <class Body>
void with_act(int act, Body body) {
    switch (act) {
        case 1: return body(Silu{});
        case 2: return body(Gelu{});
        case 3: return body(Relu{});
        default: return body(None{});
    }
}

template <class T>
const T* in(const void* address) {
    return static_cast<const T*>(address);
}
template <class T>
T* out(void* address) {
    return static_cast<T*>(address);
}

}  // namespace

// ---------------------------------------------------------------------------- entry points
//
// Called through ctypes; `_library.py` has the same list.

extern "C" {

int undiffuse_vector_floats() {
#if defined(__AVX512F__)
    return 16;
#elif defined(__AVX__)
    return 8;
#else
    return 4;
#endif
}

// eps < 0: stats are known and only read.
void undiffuse_norm_act(int is_bf16, int act, int threads, i64 pictures, i64 pixels, i64 channels,
                        i64 groups, double eps, const void* x, void* y, float* stats,
                        const float* weight, const float* bias, const float* add,
                        const float* scale, const float* shift) {
    const int worthwhile = worth(pictures * pixels * channels, threads);
    const Norm a{pictures, pixels, channels, groups, weight, bias,
                 add,      scale,  shift,    stats,  worthwhile};
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        with_act(act, [&](auto f) {
            norm_act<T, decltype(f)>(a, in<T>(x), out<T>(y), eps, eps < 0.0);
        });
    });
}

// du and dun: (pictures, channels), always written; du is the gradient of shift.
void undiffuse_norm_act_backward(int is_bf16, int act, int threads, i64 pictures, i64 pixels,
                                 i64 channels, i64 groups, const void* dy, const void* x, void* dx,
                                 float* stats, const float* weight, const float* bias,
                                 const float* add, const float* scale, const float* shift,
                                 float* du, float* dun, float* dweight, float* dbias, float* dadd,
                                 float* dscale) {
    const int worthwhile = worth(pictures * pixels * channels, threads);
    const Norm a{pictures, pixels, channels, groups, weight, bias,
                 add,      scale,  shift,    stats,  worthwhile};
    const NormGrads grads{du, dun, dweight, dbias, dadd, dscale};
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        with_act(act, [&](auto f) {
            norm_act_backward<T, decltype(f)>(a, grads, in<T>(dy), in<T>(x), out<T>(dx));
        });
    });
}

void undiffuse_winograd_input(int is_bf16, int threads, i64 b, i64 h, i64 w, i64 c, const void* x,
                              void* v) {
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        winograd_input(Tiles(b, h, w, c), in<T>(x), out<T>(v), threads);
    });
}

void undiffuse_winograd_input_adjoint(int is_bf16, int threads, i64 b, i64 h, i64 w, i64 c,
                                      const void* dv, void* dx) {
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        winograd_input_adjoint(Tiles(b, h, w, c), in<T>(dv), out<T>(dx), threads);
    });
}

void undiffuse_winograd_output(int is_bf16, int threads, i64 b, i64 h, i64 w, i64 c, const void* m,
                               const float* bias, const void* residual, void* y) {
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        winograd_output(Tiles(b, h, w, c), in<T>(m), bias, in<T>(residual), out<T>(y), threads);
    });
}

void undiffuse_winograd_output_adjoint(int is_bf16, int threads, i64 b, i64 h, i64 w, i64 c,
                                       const void* dy, void* dm) {
    with_type(is_bf16, [&](auto type) {
        using T = decltype(type);
        winograd_output_adjoint(Tiles(b, h, w, c), in<T>(dy), out<T>(dm), threads);
    });
}

// last: whether the weights are in channels_last memory format; otherwise they are contiguous.
void undiffuse_winograd_weight(int is_bf16, int threads, int last, i64 outputs, i64 inputs,
                               const float* w, void* u) {
    with_type(is_bf16, [&](auto type) {
        winograd_weight(outputs, inputs, last, w, out<decltype(type)>(u), threads);
    });
}

void undiffuse_winograd_weight_backward(int is_bf16, int threads, int last, i64 outputs, i64 inputs,
                                        const void* du, float* dw) {
    with_type(is_bf16, [&](auto type) {
        winograd_weight_backward(outputs, inputs, last, in<decltype(type)>(du), dw, threads);
    });
}

void undiffuse_channel_sum(int is_bf16, int threads, i64 pixels, i64 channels, const void* dy,
                           float* sum) {
    with_type(is_bf16, [&](auto type) {
        channel_sum(in<decltype(type)>(dy), pixels, channels, sum, threads);
    });
}

double undiffuse_squared_norm(int threads, i64 tensors, const i64* sizes,
                              const float* const* grads) {
    return squared_norm(tensors, sizes, grads, threads);
}

void undiffuse_adamw_ema(int threads, i64 tensors, const i64* sizes, float* const* params,
                         const float* const* grads, float* const* exp_avg,
                         float* const* exp_avg_sq, float* const* ema, double lr, double beta1,
                         double beta2, double eps, double weight_decay, i64 step,
                         double grad_scale, double ema_weight) {
    const double steps = static_cast<double>(step);
    AdamW o;
    o.keep = static_cast<float>(1.0 - lr * weight_decay);
    o.rate = static_cast<float>(lr / (1.0 - std::pow(beta1, steps)));
    o.beta2 = static_cast<float>(beta2);
    o.rest1 = static_cast<float>(1.0 - beta1);
    o.rest2 = static_cast<float>(1.0 - beta2);
    o.eps = static_cast<float>(eps);
    o.inverse_root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, steps)));
    o.grad_scale = static_cast<float>(grad_scale);
    o.ema_weight = static_cast<float>(ema_weight);
    const std::vector<Piece> pieces = pieces_of(tensors, sizes);
    parallel(static_cast<i64>(pieces.size()), worth(sum_of(tensors, sizes), threads), [&](i64 i) {
        const auto [t, at, count] = pieces[i];
        adamw_piece(o, count, params[t] + at, grads[t] + at, exp_avg[t] + at, exp_avg_sq[t] + at,
                    ema[t] + at);
    });
}
}
