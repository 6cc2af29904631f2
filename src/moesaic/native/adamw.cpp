// AdamW in one pass over weights and moments, in place: on bfloat16 matrices with float32 masters, and on records of
// experts, which first make up for what they missed while they were idle. And the latter alone into a copy, for who
// reads the weights.
//
// A record is [weights | first moment | second moment], each float32 or bfloat16 or, of moments, int8 in blocks of
// 256 with a float32 scale for each after all of them (offload/records.py). Outside of records an expert is its two
// matrices, each in a stack of its own. The arithmetic is that of offload/catch_up.py, in float32.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 256;
constexpr int64_t MOST_PUSHES = 3;

// What offload/experts.py lays out for each expert: see `scalars` there.
struct Scalars {
    float keep, first, second, pushes;
    float push[MOST_PUSHES], push_eps[MOST_PUSHES];
    float decay, beta1, beta2, eps, rate, root, scale, seed;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// A hash of a place and a seed, 16 bits of which decide whether a weight is rounded up.
inline uint32_t noise(uint32_t place, uint32_t seed) {
    uint32_t x = place * 0x9E3779B1u ^ seed;
    x ^= x >> 16;
    x *= 0x85EBCA6Bu;
    x ^= x >> 13;
    x *= 0xC2B2AE35u;
    return (x ^ (x >> 16)) & 0xFFFFu;
}

struct Float32 {
    using Number = float;
    static float read(float x) { return x; }
    static float write(float x, uint32_t, uint32_t) { return x; }
    static float nearest(float x) { return x; }
};

struct BFloat16 {
    using Number = uint16_t;
    static float read(uint16_t x) { return float_of(uint32_t(x) << 16); }
    static uint16_t write(float x, uint32_t place, uint32_t seed) {
        return uint16_t((bits_of(x) + noise(place, seed)) >> 16);
    }
    static uint16_t nearest(float x) {
        const uint32_t bits = bits_of(x);
        return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    }
};

// Moments of one block as float32, read from and written to a record.
template <class N>
struct Plain {
    static int64_t bytes(int64_t P) { return (P * int64_t(sizeof(typename N::Number)) + 3) / 4 * 4; }
    template <bool SECOND>
    static void read(const uint8_t* part, int64_t, int64_t begin, int64_t size, float* out) {
        const auto* from = reinterpret_cast<const typename N::Number*>(part) + begin;
        for (int64_t i = 0; i < size; ++i) out[i] = N::read(from[i]);
    }
    template <bool SECOND>
    static void write(uint8_t* part, int64_t, int64_t begin, int64_t size, const float* in) {
        auto* to = reinterpret_cast<typename N::Number*>(part) + begin;
        for (int64_t i = 0; i < size; ++i) to[i] = N::nearest(in[i]);
    }
};

struct Int8 {
    static int64_t steps(int64_t P) { return (P + 3) / 4 * 4; }
    static int64_t bytes(int64_t P) { return steps(P) + 4 * ((P + BLOCK - 1) / BLOCK); }
    template <bool SECOND>
    static void read(const uint8_t* part, int64_t P, int64_t begin, int64_t size, float* out) {
        float scale;
        std::memcpy(&scale, part + steps(P) + 4 * (begin / BLOCK), 4);
        if (SECOND) {  // its root, in 255 steps
            for (int64_t i = 0; i < size; ++i) {
                const float root = float(part[begin + i]) * scale;
                out[i] = root * root;
            }
        } else {
            const auto* from = reinterpret_cast<const int8_t*>(part) + begin;
            for (int64_t i = 0; i < size; ++i) out[i] = float(from[i]) * scale;
        }
    }
    template <bool SECOND>
    static void write(uint8_t* part, int64_t P, int64_t begin, int64_t size, const float* in) {
        float values[BLOCK];
        uint32_t most = 0;
        for (int64_t i = 0; i < size; ++i) {
            values[i] = SECOND ? std::sqrt(in[i]) : in[i];
            const uint32_t magnitude = bits_of(values[i]) & 0x7FFFFFFFu;  // of floats above 0 the order is theirs
            most = magnitude > most ? magnitude : most;
        }
        const float scale = float_of(most) / (SECOND ? 255.0f : 127.0f);
        const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        std::memcpy(part + steps(P) + 4 * (begin / BLOCK), &scale, 4);
        if (SECOND) {  // upwards: a small second moment is never zero, a step too short and not too long
            for (int64_t i = 0; i < size; ++i) {
                const float step = std::ceil(values[i] * inverse - 1e-4f);
                part[begin + i] = uint8_t(step < 0 ? 0 : step > 255 ? 255 : step);
            }
        } else {
            auto* to = reinterpret_cast<int8_t*>(part) + begin;
            for (int64_t i = 0; i < size; ++i) to[i] = int8_t(std::nearbyint(values[i] * inverse));
        }
    }
};

inline void catch_up(const Scalars& s, int64_t size, float* p, float* m, float* v) {
    for (int64_t i = 0; i < size; ++i) p[i] *= s.keep;
    const int64_t pushes = int64_t(s.pushes);
    if (pushes) {
        float root[BLOCK];
        for (int64_t i = 0; i < size; ++i) root[i] = std::sqrt(v[i]);
        for (int64_t k = 0; k < pushes; ++k)
            for (int64_t i = 0; i < size; ++i) p[i] -= s.push[k] * (m[i] / (root[i] + s.push_eps[k]));
    }
    for (int64_t i = 0; i < size; ++i) m[i] *= s.first, v[i] *= s.second;
}

inline void step(const Scalars& s, int64_t size, const float* g, float* p, float* m, float* v) {
    for (int64_t i = 0; i < size; ++i) {
        const float gradient = g[i] * s.scale;
        p[i] *= s.decay;
        m[i] += (1.0f - s.beta1) * (gradient - m[i]);
        v[i] = v[i] * s.beta2 + (1.0f - s.beta2) * gradient * gradient;
        p[i] -= s.rate * m[i] / (std::sqrt(v[i]) / s.root + s.eps);
    }
}

// Experts outside of their records: a stack of first matrices, `cut` numbers each, and one of last, `rest` each.
template <class T>
struct Stacks {
    T *first, *down;
    int64_t cut, rest;

    // Call `visit(pointer, offset, size)` for the pieces of parameters `begin` to `begin + size` of expert `n`.
    template <class F>
    void pieces(int64_t n, int64_t begin, int64_t size, F visit) const {
        const int64_t before = begin >= cut ? 0 : begin + size <= cut ? size : cut - begin;
        if (before) visit(first + n * cut + begin, int64_t(0), before);
        if (before < size) visit(down + n * rest + begin + before - cut, before, size - before);
    }
};

// Records `slot[n]` of `records`, each `stride` bytes, with the gradients of n experts.
template <class W, class M, class G>
void update(
    uint8_t* records, const int64_t* slot, int64_t count, int64_t stride, const Scalars* scalars,
    Stacks<const typename G::Number> gradients
) {
    const int64_t P = gradients.cut + gradients.rest;
    const int64_t blocks = (P + BLOCK - 1) / BLOCK;
    const int64_t weights = (P * int64_t(sizeof(typename W::Number)) + 3) / 4 * 4;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < count; ++n)
        for (int64_t b = 0; b < blocks; ++b) {
            uint8_t* record = records + slot[n] * stride;
            auto* stored = reinterpret_cast<typename W::Number*>(record) + b * BLOCK;
            uint8_t *first = record + weights, *second = first + M::bytes(P);
            const int64_t begin = b * BLOCK, size = P - begin < BLOCK ? P - begin : BLOCK;
            float p[BLOCK], m[BLOCK], v[BLOCK], g[BLOCK];
            for (int64_t i = 0; i < size; ++i) p[i] = W::read(stored[i]);
            M::template read<false>(first, P, begin, size, m);
            M::template read<true>(second, P, begin, size, v);
            gradients.pieces(n, begin, size, [&](const typename G::Number* from, int64_t at, int64_t length) {
                for (int64_t i = 0; i < length; ++i) g[at + i] = G::read(from[i]);
            });
            catch_up(scalars[n], size, p, m, v);
            step(scalars[n], size, g, p, m, v);
            const uint32_t seed = bits_of(scalars[n].seed);
            for (int64_t i = 0; i < size; ++i) stored[i] = W::write(p[i], uint32_t(begin + i), seed);
            M::template write<false>(first, P, begin, size, m);
            M::template write<true>(second, P, begin, size, v);
        }
}

// Their weights as they would be after catching up; the records stay as they are.
template <class W, class M, class O>
void gather(
    const uint8_t* records, const int64_t* slot, int64_t count, int64_t stride, const Scalars* scalars,
    Stacks<typename O::Number> out
) {
    const int64_t P = out.cut + out.rest;
    const int64_t blocks = (P + BLOCK - 1) / BLOCK;
    const int64_t weights = (P * int64_t(sizeof(typename W::Number)) + 3) / 4 * 4;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < count; ++n)
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t* record = records + slot[n] * stride;
            const auto* stored = reinterpret_cast<const typename W::Number*>(record) + b * BLOCK;
            const uint8_t *first = record + weights, *second = first + M::bytes(P);
            const int64_t begin = b * BLOCK, size = P - begin < BLOCK ? P - begin : BLOCK;
            float p[BLOCK], m[BLOCK], v[BLOCK];
            for (int64_t i = 0; i < size; ++i) p[i] = W::read(stored[i]);
            if (scalars[n].pushes > 0) {
                M::template read<false>(first, P, begin, size, m);
                M::template read<true>(second, P, begin, size, v);
                catch_up(scalars[n], size, p, m, v);
            } else if (scalars[n].keep != 1.0f) {
                for (int64_t i = 0; i < size; ++i) p[i] *= scalars[n].keep;
            }
            out.pieces(n, begin, size, [&](typename O::Number* to, int64_t at, int64_t length) {
                for (int64_t i = 0; i < length; ++i) to[i] = O::nearest(p[at + i]);
            });
        }
}

// A matrix of `size` weights in bfloat16, its gradient, its float32 master and moments: one step.
void master_step(
    uint16_t* weight, const uint16_t* gradient, float* master, float* first, float* second, int64_t size,
    const Scalars& scalars
) {
#pragma omp parallel for schedule(static)
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
        const int64_t length = size - begin < BLOCK ? size - begin : BLOCK;
        float g[BLOCK];
        for (int64_t i = 0; i < length; ++i) g[i] = BFloat16::read(gradient[begin + i]);
        step(scalars, length, g, master + begin, first + begin, second + begin);
        for (int64_t i = 0; i < length; ++i) weight[begin + i] = BFloat16::nearest(master[begin + i]);
    }
}

// The sum of squares of bfloat16 numbers: parts of 65,536 are added up in float32, in 16 lanes, and their sums in
// float64, so that it is the same for any number of threads.
double squares(const uint16_t* values, int64_t size) {
    constexpr int64_t PART = 65536, LANES = 16;
    const int64_t parts = (size + PART - 1) / PART;
    std::vector<double> sums(parts);
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = part * PART, end = begin + PART < size ? begin + PART : size;
        float lanes[LANES] = {};
        int64_t i = begin;
        for (; i + LANES <= end; i += LANES)
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const float x = BFloat16::read(values[i + lane]);
                lanes[lane] += x * x;
            }
        for (; i < end; ++i) lanes[0] += BFloat16::read(values[i]) * BFloat16::read(values[i]);
        for (const float lane : lanes) sums[part] += lane;
    }
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
}

}  // namespace

extern "C" void adamw_master(
    uint16_t* weight, const uint16_t* gradient, float* master, float* first, float* second, int64_t size,
    const void* scalars
) {
    master_step(weight, gradient, master, first, second, size, *static_cast<const Scalars*>(scalars));
}

extern "C" void squares_bfloat16(const uint16_t* values, int64_t size, double* out) { *out = squares(values, size); }

#define UPDATE(weights, W, moments, M, dtype, G)                                                                 \
    extern "C" void adamw_##weights##_##moments##_##dtype(                                                       \
        uint8_t* records, const int64_t* slot, int64_t count, int64_t stride, const void* scalars,               \
        const G::Number* first, const G::Number* down, int64_t cut, int64_t rest                                 \
    ) {                                                                                                          \
        const Stacks<const G::Number> gradients{first, down, cut, rest};                                         \
        update<W, M, G>(records, slot, count, stride, static_cast<const Scalars*>(scalars), gradients);          \
    }
#define GATHER(weights, W, moments, M, dtype, O)                                                                 \
    extern "C" void gather_##weights##_##moments##_##dtype(                                                      \
        const uint8_t* records, const int64_t* slot, int64_t count, int64_t stride, const void* scalars,         \
        O::Number* first, O::Number* down, int64_t cut, int64_t rest                                             \
    ) {                                                                                                          \
        const Stacks<O::Number> out{first, down, cut, rest};                                                     \
        gather<W, M, O>(records, slot, count, stride, static_cast<const Scalars*>(scalars), out);                \
    }
#define KERNELS(weights, W, moments, M)                \
    UPDATE(weights, W, moments, M, float32, Float32)   \
    UPDATE(weights, W, moments, M, bfloat16, BFloat16) \
    GATHER(weights, W, moments, M, float32, Float32)   \
    GATHER(weights, W, moments, M, bfloat16, BFloat16)

KERNELS(fp32, Float32, fp32, Plain<Float32>)
KERNELS(fp32, Float32, bf16, Plain<BFloat16>)
KERNELS(fp32, Float32, int8, Int8)
KERNELS(bf16, BFloat16, fp32, Plain<Float32>)
KERNELS(bf16, BFloat16, bf16, Plain<BFloat16>)
KERNELS(bf16, BFloat16, int8, Int8)
