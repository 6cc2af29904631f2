// AdamW on records of experts, in place: what an expert missed while it was idle, then perhaps a step, in one pass
// over its weights and moments. And the same without a step into a copy, for who reads the weights.
//
// A record is [weights | first moment | second moment], each float32 or bfloat16 or, of moments, int8 in blocks of
// 256 with a float32 scale for each after all of them (offload/records.py). The arithmetic is that of
// offload/catch_up.py, in float32.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BLOCK = 256;
constexpr int64_t MOST_PUSHES = 10;

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

// Records `slot[n]` of `records`, each `stride` bytes, with gradients [n, P].
template <class W, class M>
void update(
    uint8_t* records, const int64_t* slot, int64_t count, int64_t stride, int64_t P, const Scalars* scalars,
    const float* gradient
) {
    const int64_t blocks = (P + BLOCK - 1) / BLOCK;
    const int64_t weights = (P * int64_t(sizeof(typename W::Number)) + 3) / 4 * 4;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < count; ++n)
        for (int64_t b = 0; b < blocks; ++b) {
            uint8_t* record = records + slot[n] * stride;
            auto* stored = reinterpret_cast<typename W::Number*>(record) + b * BLOCK;
            uint8_t *first = record + weights, *second = first + M::bytes(P);
            const int64_t begin = b * BLOCK, size = P - begin < BLOCK ? P - begin : BLOCK;
            float p[BLOCK], m[BLOCK], v[BLOCK];
            for (int64_t i = 0; i < size; ++i) p[i] = W::read(stored[i]);
            M::template read<false>(first, P, begin, size, m);
            M::template read<true>(second, P, begin, size, v);
            catch_up(scalars[n], size, p, m, v);
            step(scalars[n], size, gradient + n * P + begin, p, m, v);
            const uint32_t seed = bits_of(scalars[n].seed);
            for (int64_t i = 0; i < size; ++i) stored[i] = W::write(p[i], uint32_t(begin + i), seed);
            M::template write<false>(first, P, begin, size, m);
            M::template write<true>(second, P, begin, size, v);
        }
}

// Their weights as they would be after catching up, [n, P]; the records stay as they are.
template <class W, class M, class O>
void gather(
    const uint8_t* records, const int64_t* slot, int64_t count, int64_t stride, int64_t P, const Scalars* scalars,
    typename O::Number* out
) {
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
            for (int64_t i = 0; i < size; ++i) out[n * P + begin + i] = O::nearest(p[i]);
        }
}

}  // namespace

#define KERNELS(weights, W, moments, M)                                                                          \
    extern "C" void adamw_##weights##_##moments(                                                                 \
        uint8_t* records, const int64_t* slot, int64_t count, int64_t stride, int64_t P, const void* scalars,    \
        const float* gradient                                                                                    \
    ) {                                                                                                          \
        update<W, M>(records, slot, count, stride, P, static_cast<const Scalars*>(scalars), gradient);           \
    }                                                                                                            \
    extern "C" void gather_##weights##_##moments##_float32(                                                      \
        const uint8_t* records, const int64_t* slot, int64_t count, int64_t stride, int64_t P,                   \
        const void* scalars, float* out                                                                          \
    ) {                                                                                                          \
        gather<W, M, Float32>(records, slot, count, stride, P, static_cast<const Scalars*>(scalars), out);       \
    }                                                                                                            \
    extern "C" void gather_##weights##_##moments##_bfloat16(                                                     \
        const uint8_t* records, const int64_t* slot, int64_t count, int64_t stride, int64_t P,                   \
        const void* scalars, uint16_t* out                                                                       \
    ) {                                                                                                          \
        gather<W, M, BFloat16>(records, slot, count, stride, P, static_cast<const Scalars*>(scalars), out);      \
    }

KERNELS(fp32, Float32, fp32, Plain<Float32>)
KERNELS(fp32, Float32, bf16, Plain<BFloat16>)
KERNELS(fp32, Float32, int8, Int8)
KERNELS(bf16, BFloat16, fp32, Plain<Float32>)
KERNELS(bf16, BFloat16, bf16, Plain<BFloat16>)
KERNELS(bf16, BFloat16, int8, Int8)
